# `make demo` and `make test` install what is missing on a fresh Debian or Ubuntu machine; as a user they ask sudo for it.
PYTHON ?= python3
BIN := .venv/bin
APT := gcc libcap-dev libseccomp2 python3-dev python3-venv util-linux

.PHONY: demo test check bench clean

demo: .venv/ready
	$(BIN)/psie run examples/hello.py --level strict --summary -- from the demo

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	@dpkg -s bubblewrap >/dev/null 2>&1 || PACKAGES=bubblewrap ./tools/apt-install
	$(BIN)/python -m benchmarks

# The venv may be used by other users (the tests start an unprivileged one), and has its bytecode compiled whatever
# PYTHONDONTWRITEBYTECODE says.
.venv/ready: pyproject.toml sandbox/version.py
	PACKAGES="$(APT)" ./tools/apt-install
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m compileall -q sandbox
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

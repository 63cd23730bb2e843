# `make demo`, `make test` and `make vm-test` install what is missing on a fresh Debian or Ubuntu machine; as a user they ask
# sudo for it.
PYTHON ?= python3
BIN := .venv/bin
APT := gcc libcap-dev libseccomp2 python3-dev python3-venv util-linux
# What some tests try psie's documents and completion with; without them they are skipped.
PEERS := crun fish golang-github-opencontainers-specs-dev zsh
BOX ?= trixie
VM := dnsmasq-base e2fsprogs iproute2 iptables libvirt-clients libvirt-daemon-driver-qemu libvirt-daemon-system mmdebstrap \
	openssh-client qemu-system-x86 qemu-utils rsync vagrant vagrant-libvirt

.PHONY: demo test test-pythons vm-test vm-test-all vm-attacks check docs bench man dist clean

demo: .venv/ready
	$(BIN)/psie run examples/hello.py --level strict --summary -- from the demo
	@echo
	@echo "It works. '. .venv/bin/activate' puts psie on your path; 'psie doctor' says what this machine can do."

# Without ALL=1 each test in one level, and without what takes long.
test: .venv/ready
	PACKAGES="$(PEERS)" ./tools/apt-install || echo "without $(PEERS): they cannot be installed"
	$(BIN)/python tools/run_tests.py $(if $(ALL),,--quick)

# All tests with each Python that is found on this machine; ARGS="3.13", ARGS="--debian sid".
test-pythons: .venv/ready
	$(BIN)/python tools/run_pythons.py $(ARGS)

# The integration tests that vagrant/in-the-vm names and the self-test in a virtual machine with systemd and a pure cgroup v2
# tree: Debian 13, or 12 with BOX=bookworm; with ALL=1 all integration tests, and the attacks at all levels.
vm-test: .venv/ready
	PACKAGES="$(VM)" ./tools/apt-install
	ALL=$(ALL) ./vagrant/test $(BOX)

vm-test-all:
	$(MAKE) vm-test BOX=trixie
	$(MAKE) vm-test BOX=bookworm

# Only all attacks at all levels, as root and without rights: what stopped which is in vagrant/results/BOX-attacks.txt.
vm-attacks: .venv/ready
	PACKAGES="$(VM)" ./tools/apt-install
	./vagrant/test $(BOX) attacks

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as pages in site/; a link that leads nowhere is an error. (With --quiet no warning would count.)
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

# ARGS="--quick", ARGS="--only call"
bench: .venv/bench
	PACKAGES="bubblewrap gcc" ./tools/apt-install
	$(BIN)/python -m benchmarks $(ARGS)

# sandlock is a peer, which not every machine can have.
.venv/bench: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check sandlock || echo "without sandlock: it cannot be installed"
	touch $@

# The venv may be used by other users (the tests start an unprivileged one), and has its bytecode compiled whatever
# PYTHONDONTWRITEBYTECODE says.
.venv/ready: pyproject.toml sandbox/version.py bin/psie bin/psie-python
	@PACKAGES="$(APT)" ./tools/apt-install
	$(PYTHON) -m venv .venv
	@echo "installing psie and the Python packages that it needs into .venv (a minute or so)"
	PIP_USE_PEP517=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m compileall -q "$(CURDIR)/sandbox"
	touch $@

# The manual page, of the commands as they are.
man: .venv/ready
	$(BIN)/python tools/man_page.py

# The source distribution and, from it, the wheel.
dist: .venv/ready
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build

clean:
	rm -rf .venv .pythons dist .mypy_cache .ruff_cache .pytest_cache .hypothesis site vagrant/.vagrant vagrant/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

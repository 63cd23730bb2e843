"""`psie spec`: the document, its seccomp rules against the program that psie itself loads, and containers that crun runs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, host, recipe
from sandbox.config import SecurityLevel
from sandbox.seccomp import filter as profiles
from sandbox.spec import PLUGIN_FOLDER, Spec, spec_of

from . import harness

LEVELS = [IsolationLevel.STANDARD, IsolationLevel.STRICT, IsolationLevel.MAXIMUM]
SCHEMA = Path("/usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema")  # golang-github-opencontainers-specs-dev
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
PSIE = [sys.executable, "-m", "sandbox.cli"]


@pytest.fixture(params=LEVELS, ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    return IsolationLevel(request.param)


def made(level: IsolationLevel, facts: host.HostFacts | None = None, **settings: Any) -> Spec:
    facts = facts or host.facts()
    permissions = PluginPermissionsV2(**settings.pop("permissions", {}))
    limits = PluginLimitsV2(**settings.pop("limits", {}))
    compiled = recipe.compile(IsolationConfig(level=level, **settings), limits, permissions, facts)
    return spec_of(compiled, facts, ["one"], ("plugin.py", b"pass\n"))


def psie(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*PSIE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=harness.REPOSITORY, timeout=60 * harness.PATIENCE)


# -- the document ------------------------------------------------------------------------------------------------------------


def test_document(level: IsolationLevel) -> None:
    config = made(level).config
    process, linux = config["process"], config["linux"]
    assert process["args"] == [host.facts().executable, f"{PLUGIN_FOLDER}/plugin.py", "one"]
    assert process["noNewPrivileges"] is True
    assert set(map(tuple, process["capabilities"].values())) == {()}
    assert {each["type"] for each in linux["namespaces"]} >= {"user", "mount", "pid", "ipc", "uts", "cgroup"}
    assert ("network" in {each["type"] for each in linux["namespaces"]}) == (level is not IsolationLevel.STANDARD)
    assert {"type": "RLIMIT_NOFILE", "soft": 50, "hard": 50} in process["rlimits"]
    assert config["root"] == {"path": "rootfs", "readonly": True}
    by_path = {mount["destination"]: mount for mount in config["mounts"]}
    assert by_path["/workspace"]["type"] == "tmpfs"
    assert f"size={100 << 20}" in by_path["/workspace"]["options"]
    for mount in config["mounts"]:
        if mount["type"] == "bind":
            assert {"ro", "nosuid", "nodev"} <= set(mount["options"])
    order = [mount["destination"] for mount in config["mounts"]]
    for number, path in enumerate(order):
        assert not any(above.startswith(path + "/") for above in order[:number])
    assert config["annotations"]["psie.level"] == level.value
    assert "Landlock" in config["annotations"]["psie.not-expressed"]


def test_ids_are_nobodys(level: IsolationLevel) -> None:
    mapped = made(level, replace(host.facts(), root=True)).config["linux"]["uidMappings"] if harness.ROOT else []
    assert 0 not in [each["hostID"] for each in mapped]
    rootless = made(level, replace(host.facts(), root=False, uid=1234, gid=1235))
    assert rootless.config["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 1234, "size": 1}]
    assert rootless.config["linux"]["gidMappings"] == [{"containerID": 0, "hostID": 1235, "size": 1}]
    assert any("id 0 in its user namespace" in sentence for sentence in rootless.lost)


def test_resources(level: IsolationLevel) -> None:
    """Of a host that has the controllers; where there are none, rlimits stand in."""
    resources = made(level, replace(host.facts(), cgroup_kind="root", controllers=("memory", "pids", "cpu"))).config["linux"][
        "resources"
    ]
    assert resources["memory"] == {"limit": 128 << 20, "swap": 128 << 20}
    assert resources["pids"] == {"limit": 5}
    assert resources["cpu"] == {"quota": 50_000, "period": 100_000}
    assert resources["unified"] == {"memory.oom.group": "1", "memory.high": str(96 << 20), "cpu.weight": "50"}
    bare = made(level, replace(host.facts(), cgroup_kind="", controllers=())).config
    assert "resources" not in bare["linux"]
    assert "RLIMIT_DATA" in {each["type"] for each in bare["process"]["rlimits"]}


def test_what_cannot_be_expressed_is_said(tmp_path: Path) -> None:
    permissions = {"allowed_directories": [str(tmp_path)], "allow_network_access": True, "allowed_hosts": ["192.0.2.1"]}
    spec = made(IsolationLevel.MAXIMUM, permissions=permissions)
    said = "; ".join(spec.lost)
    for what in ("Landlock", "reaches no host at all", "empty veth", "wall clock (30 s)", f"{tmp_path} is read-only"):
        assert what in said
    (mount,) = [mount for mount in spec.config["mounts"] if mount["destination"] == str(tmp_path)]
    assert "ro" in mount["options"]


def mistakes(value: Any, schema: dict[str, Any], file: str, where: str = "") -> list[str]:
    """What is wrong with it by a JSON schema (draft 4), as far as the specification's uses that."""
    known = {"$ref", "type", "required", "properties", "patternProperties", "items", "enum", "pattern", "minimum", "maximum",
             "minItems", "anyOf", "oneOf", "description", "$schema", "id", "definitions"}  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        name, _, pointer = schema["$ref"].partition("#")
        file = name or file
        found = json.loads((SCHEMA / file).read_text())
        for part in pointer.strip("/").split("/"):
            found = found[part]
        return mistakes(value, found, file, where)
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    if "type" in schema and (not isinstance(value, types[schema["type"]]) or (value is True and schema["type"] == "integer")):
        return [f"{where}: {value!r} is no {schema['type']}"]
    wrong = [f"{where}: no {name}" for name in schema.get("required", ()) if name not in value]
    if "minItems" in schema and len(value) < schema["minItems"]:
        wrong.append(f"{where}: too few")
    if "enum" in schema and value not in schema["enum"]:
        wrong.append(f"{where}: {value!r} is not in the list")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        wrong.append(f"{where}: {value!r} does not match")
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        wrong.append(f"{where}: {value!r} is out of range")
    for choice, most in (("anyOf", 9), ("oneOf", 1)):
        fits = [each for each in schema.get(choice, ()) if not mistakes(value, each, file)]
        if choice in schema and not 1 <= len(fits) <= most:
            wrong.append(f"{where}: fits {len(fits)} of {choice}")
    if isinstance(value, dict):
        for name, item in value.items():
            parts = [schema.get("properties", {}).get(name)]
            parts += [each for pattern, each in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
            wrong += [text for each in parts if each is not None for text in mistakes(item, each, file, f"{where}.{name}")]
    if isinstance(value, list) and "items" in schema:
        wrong += [
            text for number, item in enumerate(value) for text in mistakes(item, schema["items"], file, f"{where}[{number}]")
        ]
    return wrong


def test_schema() -> None:
    """The specification's own, from Debian's package of it."""
    if not SCHEMA.is_dir():
        pytest.skip("needs Debian's golang-github-opencontainers-specs-dev")
    name = "config-schema.json"
    schema = json.loads((SCHEMA / name).read_text())
    spec = made(IsolationLevel.STRICT, replace(host.facts(), cgroup_kind="root", controllers=("memory", "pids", "cpu")))
    config = json.loads(json.dumps(spec.config))
    del config["linux"]["seccomp"]["syscalls"][200:]  # thousands of the same kind
    assert mistakes(config, schema, name) == []
    config["process"]["rlimits"][0]["hard"] = "much"
    config["linux"]["namespaces"].append({"type": "planet"})
    del config["mounts"][0]["destination"]
    assert len(mistakes(config, schema, name)) == 3


# -- seccomp -----------------------------------------------------------------------------------------------------------------


def answer(program: bytes, number: int, arguments: tuple[int, ...]) -> int:
    """What a BPF program returns for a system call of this machine: linux/filter.h, as far as seccomp programs use it."""
    data = struct.pack("=IIQ6Q", number, ARCH[os.uname().machine], 0, *arguments)
    instructions = list(struct.iter_unpack("=HBBI", program))
    place = accumulator = 0
    while True:
        code, on_true, on_false, value = instructions[place]
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return int(value)
        elif code == 0x05:
            place += value
        else:
            holds = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
                0x45: accumulator & value,
            }
            place += on_true if holds[code] else on_false


def passes(rules: list[dict[str, Any]], name: str, arguments: tuple[int, ...]) -> bool:
    """Whether an OCI runtime's filter lets it pass: one rule that fits is enough, each with all of its tests."""
    for rule in rules:
        tests = rule.get("args", ())
        if rule["action"] == "SCMP_ACT_ALLOW" and name in rule["names"]:
            assert len({test["index"] for test in tests}) == len(tests)  # libseccomp takes one for each argument
            if all(arguments[test["index"]] & test["value"] == test["valueTwo"] for test in tests):
                return True
    return False


@pytest.mark.long
@pytest.mark.parametrize("profile", profiles.PROFILES)
@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
def test_seccomp_is_the_same(profile: str, is_open: bool) -> None:
    """Each system call with arguments of every kind that a rule looks at: as psie's own program, without a supervisor."""
    security = {"denylist": SecurityLevel.LOW, "allowlist": SecurityLevel.HIGH, "tight": SecurityLevel.MAXIMUM}[profile]
    permissions: dict[str, Any] = {"security_level": security}
    limits = {}
    if is_open:
        permissions["allow_subprocess_execution"], limits["max_subprocess_count"] = True, 3
    else:
        permissions["allow_thread_creation"] = False
    config = IsolationConfig(level=IsolationLevel.STANDARD)
    facts = host.facts()
    compiled = recipe.compile(config, PluginLimitsV2(**limits), PluginPermissionsV2(**permissions), facts)
    assert compiled.seccomp["profile"] == profile
    rules = spec_of(compiled, facts, []).config["linux"]["seccomp"]["syscalls"]
    settings = {name: compiled.seccomp[name] for name in profiles.FEATURES}
    program = profiles.compile_profile(profile, **settings, notify=False)
    described = profiles._Profile(profile)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for rule in rules:
        for name in rule["names"]:
            by_name.setdefault(name, []).append(rule)
    chance = random.Random(1)
    values = sorted({*described.values(*described.constants)} | {0, 1, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1})
    guarded = {name for rule in described.rules for name in rule["syscalls"]}
    seen = set()
    for name, number in profiles.known_syscalls(os.uname().machine).items():
        tries: list[tuple[int, ...]] = [(0,) * 6]
        if name in guarded:
            tries += [tuple(chance.choice(values) for _ in range(6)) for _ in range(60)]
            tries += [(value, value, value, value, 0, 0) for value in values]
            tries += [tuple(chance.choice(values) & chance.getrandbits(64) for _ in range(6)) for _ in range(60)]
        for arguments in tries:
            own = answer(program, number, arguments) == 0x7FFF0000  # SECCOMP_RET_ALLOW
            assert passes(by_name.get(name, []), name, arguments) == (own or name == "execve"), (name, arguments)
            seen.add(own)
    assert seen == {False, True}


# -- the command -------------------------------------------------------------------------------------------------------------


def test_printed(tmp_path: Path) -> None:
    done = psie("spec", "--level", "strict")
    assert done.returncode == 0
    assert json.loads(done.stdout)["annotations"]["psie.level"] == "strict"
    assert "psie: not in an OCI container: Landlock" in done.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--level", "minimal"], "an OCI container always has one: use level standard or more"),
        (["--level", "strct"], "did you mean strict"),
        (["no-such-file.py"], "there is no such file"),
        (["--bundle", "{full}"], "there is something already"),
        (["--bundle", "{full}/no/way"], "make it first"),
        (["--bundle", ""], "--bundle is empty: "),
        (["--bundle", "/proc/bundle"], "--bundle /proc/bundle: this cannot be made ("),
    ],
)
def test_mistakes(words: list[str], why: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = psie("spec", *(word.replace("{full}", str(tmp_path / "full")) for word in words))
    assert (done.returncode, done.stdout) == (125, "")
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# -- containers --------------------------------------------------------------------------------------------------------------

# In a mount namespace of its own, with a cgroup v2 tree where crun wants it: hybrid hosts have another one there.
RUN = 'mount -t cgroup2 none /sys/fs/cgroup && exec crun --cgroup-manager=disabled --root "$1" run -b "$2" "$3"'

ATTACKS = """
import ctypes, errno, json, os, socket, sys

libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def write(path):
    with open(path, "w"):
        pass

attacks = {
    "new user namespace": lambda: call("unshare", 0x10000000),
    "new mount": lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "trace": lambda: call("ptrace", 0, 0, 0, 0),
    "passwords": lambda: open("/etc/shadow").read(),
    "a file of the host": lambda: write(FILE),
    "a socket": lambda: socket.socket().connect(("127.0.0.1", PORT)),
    "the host's name": lambda: call("sethostname", b"attacked", 8),
    "kernel settings": lambda: open("/proc/sys/kernel/core_pattern", "r+").close(),
}
told = {}
for name, attack in attacks.items():
    child = os.fork() if FORKS else 0
    if child:
        told[name] = json.loads(os.read(reading, 1000))
        os.waitpid(child, 0)
        continue
    try:
        attack()
        came = "done"
    except OSError as error:
        came = errno.errorcode[error.errno]
    if FORKS:
        os.write(writing, json.dumps(came).encode())
        os._exit(0)
    told[name] = came
told["fork"] = "done"
try:
    child = os.fork()
    if child == 0:
        os._exit(0)
except OSError as error:
    told["fork"] = errno.errorcode[error.errno]
print(json.dumps(told))
"""


@pytest.fixture
def crun() -> None:
    if not harness.ROOT:
        pytest.skip("needs root: crun is shown here as root")
    if shutil.which("crun") is None:
        pytest.skip("needs crun: apt-get install crun")
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "mount -t cgroup2 none /sys/fs/cgroup"]
    tried = subprocess.run(words, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"crun needs a cgroup v2 tree, which cannot be mounted here: {tried.stderr.strip()}")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that the container's ids can come to; pytest's are closed."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def contained(level: IsolationLevel, source: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A plugin, in a container that crun makes of a bundle."""
    plugin, bundle = folder / "attack.py", folder / "bundle"
    plugin.write_text(source)
    done = psie("spec", "--level", level.value, "--bundle", bundle, plugin, *arguments)
    assert done.returncode == 0, done.stderr
    name = f"psie-test-{os.getpid()}-{level.value}"
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", RUN, "sh", str(folder / "run"), str(bundle), name]
    return subprocess.run(words, capture_output=True, text=True, timeout=60 * harness.PATIENCE)


@pytest.mark.usefixtures("crun")
def test_crun_runs_the_plugin(level: IsolationLevel, open_folder: Path) -> None:
    source = (
        "import json, os, sys\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "open('left', 'w').write('x')\n"
        "print(json.dumps([sys.argv, os.getpid(), os.getuid(), os.getcwd(), os.uname().nodename, "
        "status['CapBnd'].strip(), status['NoNewPrivs'].strip(), status['Seccomp'].strip(), os.listdir()]))\n"
        "sys.exit(3)\n"
    )
    done = contained(level, source, open_folder, "one", "two")
    assert done.returncode == 3, done.stderr
    argv = [f"{PLUGIN_FOLDER}/attack.py", "one", "two"]
    assert json.loads(done.stdout) == [argv, 1, 1000, "/workspace", "psie", "0" * 16, "1", "2", ["left"]]


def test_a_bundle_that_the_container_cannot_come_to_is_told_of(as_root: None, open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    for folder, gates in ((open_folder, []), (closed, [f"psie: {closed} is closed to the container's ids"])):
        plugin = folder / "plugin.py"
        plugin.write_text("")
        done = psie("spec", "--bundle", folder / "bundle", plugin)
        assert done.returncode == 0
        told = [line.partition(",")[0] for line in done.stderr.splitlines() if "is closed" in line]
        assert told == gates


@pytest.mark.usefixtures("crun")
def test_attacks_fail_in_crun(level: IsolationLevel, open_folder: Path) -> None:
    """Each is done outside first, by a process with the same program."""
    import socket

    file = Path(f"/etc/psie-attack-{os.getpid()}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"import os\nFILE, PORT, FORKS = {str(file)!r}, {server.getsockname()[1]}, {{}}\nreading, writing = os.pipe()\n"
        control = open_folder / "outside.py"
        control.write_text(head.format(True) + ATTACKS)
        words = ["unshare", "--mount", "--uts", "--propagation", "private", sys.executable, str(control)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            assert file.exists()
        finally:
            file.unlink(missing_ok=True)
        assert set(json.loads(done.stdout).values()) == {"done"}
        inside = contained(level, head.format(False) + ATTACKS, open_folder)
    assert inside.returncode == 0, inside.stderr
    told = json.loads(inside.stdout)
    assert "done" not in told.values(), told
    assert not file.exists()

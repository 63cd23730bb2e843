"""Why something was refused: the table of what allows what, its sentences, and that nothing in it can rot."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
import tomllib
import types
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sandbox import Explanation, IsolationConfig, PluginLimitsV2, PluginPermissionsV2, host, load_config, recipe
from sandbox.cli import options, refusals, settings
from sandbox.engine import access, channel, outcome
from sandbox.engine.access import Access
from sandbox.errors import ResourceLimitExceededError, SecurityViolationError
from sandbox.explanations import (
    CALLS,
    CLASSES,
    GIVEN,
    QUIET,
    RULES,
    explain,
    imported,
    kernel,
    limited,
    more,
    network,
    quiet,
    socket,
    tasks,
)
from sandbox.violations import SandboxViolation, SandboxViolationType

SOURCES = Path(recipe.__file__).parent
TABLES = {"isolation": IsolationConfig, "limits": PluginLimitsV2, "permissions": PluginPermissionsV2}
NOTHING = sorted(key for key, rule in RULES.items() if not rule.settings)
LIMITS = sorted(key for key, rule in RULES.items() if rule.settings and rule.settings[0][1].startswith("max_"))
OTHERS = sorted(set(RULES) - set(NOTHING) - set(LIMITS))
FIELDS = [(table, name) for rule in RULES.values() for table, name, _ in rule.settings]


def standard(key: str) -> Explanation:
    """What `key` says to somebody with the defaults."""
    rule = RULES[key]
    if key in ("threads", "tasks"):
        return tasks(4, 16 if key == "tasks" else 0)
    if key in LIMITS:
        table, name, _ = rule.settings[0]
        return limited(key, getattr(TABLES[table](), name))
    example = "/srv" if key == "file" else "json"
    given = {name: [example] for _, name, value in rule.settings if value is GIVEN}
    return explain(key, "what", given, word=example if rule.flag and "{}" in rule.flag else "")


def from_toml(explanation: Explanation, folder: Path) -> dict[str, Any]:
    """The fields that its lines set, as load_config reads them, in their order."""
    assert explanation.toml is not None
    (folder / "psie.toml").write_text(explanation.toml)
    loaded = dict(zip(("isolation", "limits", "permissions"), load_config(folder / "psie.toml"), strict=True))
    said = tomllib.loads(explanation.toml)
    return {f"{CLASSES[table]}.{name}": getattr(loaded[table], name) for table, names in said.items() for name in names}


# -- the table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "name"), FIELDS)
def test_every_setting_is_a_field(table: str, name: str) -> None:
    assert name in {field.name for field in dataclasses.fields(TABLES[table])}
    assert CLASSES[table] == TABLES[table].__name__


@pytest.mark.parametrize("key", RULES)
def test_every_flag_is_an_option(key: str) -> None:
    flag = RULES[key].flag
    if flag is not None:
        assert flag.split()[0] in {name for name, *_ in options.RUN}
        assert RULES[key].settings


@pytest.mark.parametrize("key", [*LIMITS, *OTHERS])
def test_every_line_of_toml_is_read_and_changes_something(key: str, tmp_path: Path) -> None:
    explanation = standard(key)
    fields = from_toml(explanation, tmp_path)
    assert explanation.setting == next(iter(fields))
    table = next(table for table, name in CLASSES.items() if name == explanation.setting.partition(".")[0])
    value, before = fields[explanation.setting], getattr(TABLES[table](), explanation.setting.partition(".")[2])
    if key == "file creation":
        before = False  # it undoes what somebody has set
    assert value > before if key in LIMITS else value != before


@pytest.mark.parametrize("key", [*LIMITS, *OTHERS])
def test_python_says_the_same_as_toml(key: str, tmp_path: Path) -> None:
    explanation = standard(key)
    assert explanation.python is not None
    fields = from_toml(explanation, tmp_path)
    names = {cls.__name__: cls for cls in TABLES.values()}
    made = {type(one).__name__: one for one in (eval(each, dict(names)) for each in explanation.python.split(" and "))}
    for setting, value in fields.items():
        cls, _, name = setting.partition(".")
        assert getattr(made[cls], name) == value


@pytest.mark.parametrize("key", [key for key in RULES if RULES[key].flag])
def test_the_flag_says_the_same_as_toml(key: str, tmp_path: Path) -> None:
    explanation = standard(key)
    assert explanation.flag is not None
    more_flags = {"tasks": ["--allow-subprocess"], "deletion": ["--rw", "/srv"]}.get(key, [])
    given = options.parse([*explanation.flag.split(), *more_flags, "plugin.py"], options.RUN)
    assert given is not None
    made = {type(one).__name__: one for one in settings.settings(given)}
    for setting, value in from_toml(explanation, tmp_path).items():
        cls, _, name = setting.partition(".")
        assert getattr(made[cls], name) == value


@pytest.mark.parametrize("key", [*LIMITS, "processes"])
def test_what_allows_more_reaches_the_recipe(key: str, tmp_path: Path) -> None:
    def numbers(limits: PluginLimitsV2, permissions: PluginPermissionsV2) -> dict[str, Any]:
        made = recipe.compile(IsolationConfig(), limits, permissions, host.facts(), strict=False)
        more = {"requests": made.network["max_requests"], "operations": made.monitoring["max_file_operations"]}
        return {**made.limits, "subprocess": made.seccomp["allow_subprocess"], **more}

    explanation = standard(key)
    from_toml(explanation, tmp_path)
    _, limits, permissions = load_config(tmp_path / "psie.toml")
    if key == "tasks":
        permissions = PluginPermissionsV2(allow_subprocess_execution=True)
        before = numbers(PluginLimitsV2(max_subprocess_count=16), permissions)
    else:
        before = numbers(PluginLimitsV2(), PluginPermissionsV2())
    after = numbers(limits, permissions)
    assert any(after[name] > before[name] for name in after)
    assert all(after[name] >= before[name] for name in after)


def test_every_call_that_is_told_has_a_reason() -> None:
    profile = tomllib.loads((SOURCES / "seccomp" / "denylist.toml").read_text())
    told = {name for names in profile["notify"].values() for name in names}
    ruled = {name for rule in profile["rule"] if rule["action"] == "notify" for name in rule["syscalls"]}
    known = {name for names in CALLS.values() for name in names}
    assert told <= known
    by_the_supervisor = {"connect", "bind", "listen", "setsockopt"}  # or refused without a word
    assert ruled - known - outcome.PERMISSION - by_the_supervisor <= outcome.NETWORK
    assert set(CALLS) < set(NOTHING)


def test_what_has_no_record_is_found_by_its_names() -> None:
    def found(line: str, *allowed: str) -> str:
        made = recipe.compile(IsolationConfig(), PluginLimitsV2(), PluginPermissionsV2(), host.facts(), strict=False)
        made.seccomp.update({name: name in allowed for name in ("allow_metadata", "allow_uncounted_memory")})
        told = quiet(line, made)
        return told[1].reason if told is not None else ""

    assert found("os.chown(path, 0, 0)") == "seccomp refuses to change modes, owners and times of files"
    assert found("os.chown(path, 0, 0)", "allow_metadata") == "chown takes a capability, and a plugin has none"
    assert found("os.chmod(path, 0)", "allow_metadata") == ""
    assert found("m = mmap.mmap(-1, 5)") == "seccomp refuses memory without a file where there is no memory controller"
    assert found("m = mmap.mmap(-1, 5)", "allow_uncounted_memory") == ""
    assert found("fcntl.fcntl(f, fcntl.F_OFD_SETLK, data)") == "seccomp refuses locks of open files"
    assert found("fcntl.fcntl(f, fcntl.F_SETPIPE_SZ, 1 << 24)") == ""
    assert found("raise PermissionError(os.chown(path))") == ""
    assert found("os.sched_setaffinity(1, {nice})") == ""
    assert {*QUIET} < set(NOTHING)


def test_every_violation_is_made_with_its_explanation() -> None:
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "SandboxViolation":
                given = [keyword.arg for keyword in node.keywords]
                assert "explanation" in given, f"{path}, line {node.lineno}: say why, see sandbox/explanations.py"


# -- sentences -----------------------------------------------------------------------------------------------------------


def test_sentences() -> None:
    assert explain("processes", file="plugin.py", line=12).text() == (
        "seccomp refuses new processes: allow it with --allow-subprocess, "
        "PluginPermissionsV2(allow_subprocess_execution=True) and PluginLimitsV2(max_subprocess_count=16), "
        "or in a --config file [permissions] allow_subprocess_execution = true, [limits] max_subprocess_count = 16 "
        "(plugin.py, line 12)"
    )
    assert str(limited("memory", 64)) == (
        "memory is limited to 64 MB: allow more with --memory 128M, PluginLimitsV2(max_memory_mb=128), "
        "or in a --config file [limits] max_memory_mb = 128"
    )
    assert kernel("unshare").text() == (
        "seccomp refuses new namespaces (unshare): no setting and no level allows it; "
        "a plugin in its own has capabilities there"
    )
    assert limited("cpu", 50, refused=False).text().startswith("only a warning, nothing was refused: the CPU rate is limited")
    assert Explanation("p", "r", "PluginLimitsV2.max_inodes").text() == "r: allow more with PluginLimitsV2.max_inodes"


def test_it_is_plain_data_too() -> None:
    explanation = explain("deletion")
    plain = explanation.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["text"] == explanation.text()
    record = SandboxViolation(SandboxViolationType.PERMISSION_DENIED, "m", datetime.now(UTC), explanation=explanation)
    assert record.to_dict()["explanation"] == plain
    assert pickle.loads(pickle.dumps(explanation)) == explanation


@pytest.mark.parametrize(("value", "expected"), [(64, 128), (0.3, 0.6), (1.5, 3), (0, 1), (33.4, 67)])
def test_more(value: float, expected: float) -> None:
    assert more(value) == expected


def test_an_error_says_it_in_its_second_line() -> None:
    error = ResourceLimitExceededError("too long", limit="time", allowed=1, explanation=limited("time", 1))
    first, second = str(error).splitlines()
    assert first == "too long (time: 1 allowed)"
    assert second == limited("time", 1).text()
    assert str(SecurityViolationError("no", explanation=kernel("bpf"))) == "no", "nothing would help"


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("socket", (2, 1, 0), "sockets"),
        ("socket", (10, 0x80801, 6), "sockets"),
        ("socket", (10, 2, 17), "other sockets"),
        ("socket", (2, 3, 255), "other sockets"),
        ("socket", (2, 1, 262), "other sockets"),
        ("socket", (40, 1, 0), "other sockets"),
        ("socketpair", (16, 3, 0), "other sockets"),
    ],
)
def test_kinds_of_sockets(name: str, arguments: tuple[int, ...], key: str) -> None:
    assert socket(name, arguments) == explain(key)


# -- the network ---------------------------------------------------------------------------------------------------------

OPEN = {"allow_network_access": True}
RESOLVED = {key: {"known.example": ["93.184.216.34"]} for key in ("names", "allowed")}


@pytest.mark.parametrize(
    ("permissions", "setting"),
    [
        ({}, "allow_network_access"),
        (OPEN, "allowed_hosts"),
        ({**OPEN, "allowed_hosts": ["10.0.0.0/8", "known.example"]}, "allowed_hosts"),
        ({**OPEN, "allowed_hosts": ["*:1"], "allowed_ports": []}, "allowed_hosts"),
        ({**OPEN, "blocked_hosts": ["*"]}, "blocked_hosts"),
        ({**OPEN, "allowed_hosts": ["*"], "blocked_hosts": ["known.example:80", "8.8.8.8"]}, "blocked_hosts"),
        ({**OPEN, "blocked_hosts": ["93.184.0.0/16", "known.example", "known.example:81", "::/0"]}, "blocked_hosts"),
    ],
)
@pytest.mark.parametrize(
    ("address", "port"),
    [("93.184.216.34", 80), ("93.184.216.34", 8080), ("::ffff:93.184.216.34", 81), ("0.0.0.0", 80), ("2001:db8::1", 80)],
)
def test_what_would_allow_a_connection_does(
    permissions: dict[str, Any], setting: str, address: str, port: int, tmp_path: Path
) -> None:
    def access_of(given: PluginPermissionsV2) -> Access:
        made = recipe.compile(IsolationConfig(), PluginLimitsV2(), given, host.facts(), strict=False)
        sandbox.recipe = made
        return Access(made.network["access"], RESOLVED)

    sandbox: Any = types.SimpleNamespace(resolved=RESOLVED)
    wanted = access.plain(access.parse(address))
    is_allowed, reason = access_of(PluginPermissionsV2(**permissions)).decide(wanted, port)
    told = {"operation": "connect", "family": "AF_INET", "address": address, "port": port, "reason": reason}
    explanation = network(told, "connect()", sandbox, is_excess=False)
    if is_allowed:
        assert explanation == explain("impossible connection", "connect()")
        return
    settings_said = {"allow_network_access", "allowed_hosts", "blocked_hosts"}
    assert explanation.setting is not None
    assert explanation.setting.partition(".")[2] in settings_said & {setting, "allowed_hosts"}
    fields = {name.partition(".")[2]: value for name, value in from_toml(explanation, tmp_path).items()}
    assert access_of(PluginPermissionsV2(**{**permissions, **fields})).decide(wanted, port)[0]
    if explanation.flag is not None:
        hosts = explanation.flag.removeprefix("--allow-host ")
        by_flag = {**permissions, **OPEN, "allowed_hosts": [*permissions.get("allowed_hosts", []), hosts]}
        assert access_of(PluginPermissionsV2(**by_flag)).decide(wanted, port)[0]


@pytest.mark.parametrize(
    "told",
    [
        {
            "operation": "socket",
            "family": "AF_VSOCK",
            "type": "SOCK_STREAM",
            "address": None,
            "port": None,
            "reason": "only TCP can be had",
        },
        {"operation": "connect", "family": "AF_UNIX", "address": "/run/x", "port": None, "reason": "only TCP can be had"},
        {"operation": "listen", "family": "", "address": None, "port": None, "reason": "a plugin cannot listen"},
        {"operation": "connect", "family": "AF_INET", "address": "1.2.3.4", "port": None, "reason": "whatever"},
    ],
)
def test_what_no_list_of_hosts_allows(told: dict[str, Any]) -> None:
    sandbox: Any = types.SimpleNamespace(recipe=types.SimpleNamespace(network={"access": None}), resolved={})
    explanation = network(told, "that", sandbox, is_excess=False)
    assert explanation.setting is None
    assert "no setting and no level allows it" in explanation.text()


def test_too_many_connections() -> None:
    sandbox: Any = types.SimpleNamespace(recipe=types.SimpleNamespace(network={"access": {}, "max_requests": 10}), resolved={})
    told = {"operation": "connect", "family": "AF_INET", "address": "1.2.3.4", "port": 80, "reason": "too many"}
    assert network(told, "that", sandbox, is_excess=True).toml == "[limits]\nmax_network_requests = 20"


# -- what the plugin says ------------------------------------------------------------------------------------------------


def lists(**modules: list[str]) -> Any:
    return types.SimpleNamespace(modules={"allowed": [], "blocked": [], **modules})


def test_a_refused_import_proposes_the_list_that_allows_it() -> None:
    blocked = imported("blocked_modules", "os.path", lists(blocked=["json", "os"]), "p.py", 3)
    assert blocked.toml == '[permissions]\nblocked_modules = ["json"]'
    assert (blocked.file, blocked.line) == ("p.py", 3)
    allowed = imported("allowed_modules", "os.path", lists(allowed=["json"]), "p.py", 3)
    assert allowed.python == "PluginPermissionsV2(allowed_modules=['json', 'os.path'])"


@pytest.mark.parametrize("module", ['a"]\n[limits]\nmax_memory_mb = 9', "a b", "", "a..b", "\x1b[2J", "x" * 5000])
def test_a_forged_module_is_not_proposed(module: str) -> None:
    said = imported("allowed_modules", module, lists(allowed=["json"]), "\x1b[31m" + "f" * 5000, None)
    assert (said.toml, said.python, said.flag) == (None, None, None)
    assert said.setting == "PluginPermissionsV2.allowed_modules"
    assert len(said.text()) < 1000
    assert said.text().isprintable()


def call_that_raised(done: str, *, file: str = "plugin.py", line: int = 7, errno: int = 1) -> Any:
    fields = {"type": "PermissionError", "message": "m", "traceback": "t", "errno": errno, "file": file, "line": line}
    reply = channel.pack("failure", {**fields, "done": done})
    made = recipe.compile(IsolationConfig(), PluginLimitsV2(), PluginPermissionsV2(), host.facts(), strict=False)
    made.seccomp.update(allow_metadata=True)
    said = {"reply_kind": channel.REPLY_ERROR, "reply_complete": True, "reply": reply, "source_file": __file__}
    return types.SimpleNamespace(**said, sandbox=types.SimpleNamespace(recipe=made), passing=None, number=1)


def refused(syscall: str) -> SandboxViolation:
    explanation = kernel(syscall)
    details = {"syscall": syscall, "count": 1}
    kind = SandboxViolationType.SECURITY_BREACH
    return SandboxViolation(kind, "m", datetime.now(UTC), details=details, explanation=explanation)


@pytest.mark.parametrize(
    ("syscall", "done"),
    [
        ("socket", "socket __init__ _socket.socket.__init__(self, family, type, proto, fileno)"),
        ("socket", "connection = socket.socket()"),
        ("clone", "subprocess _execute_child self.pid = _fork_exec("),
        ("vfork", "if os.fork() == 0:"),
        ("execve", 'os.execv("/bin/sh", [])'),
        ("chroot", 'os.chroot("/")'),
        ("connect", "socket create_connection sock.connect(sa)"),
    ],
)
def test_an_exception_tells_where_it_was(syscall: str, done: str) -> None:
    other = "chroot" if syscall != "chroot" else "socket"
    violations = [refused(syscall), refused(syscall), refused(other)]
    outcome.locate(call_that_raised(done), violations)
    places = [(each.explanation.file, each.explanation.line) for each in violations if each.explanation]
    assert places == [(None, None), ("plugin.py", 7), (None, None)], "the last of its kind"
    assert violations[1].details["position"] == "interpreter"


@pytest.mark.parametrize(
    "call",
    [
        call_that_raised("os.chmod(path, 0)"),
        call_that_raised("execute(socketry, forks)"),
        call_that_raised("socket.socket()", errno=13),
        call_that_raised("socket.socket()", file=""),
        call_that_raised("", file="/etc/shadow"),
        types.SimpleNamespace(reply_kind=channel.REPLY_ERROR, reply_complete=True, reply=b"odd", source_file=""),
        types.SimpleNamespace(reply_kind=channel.REPLY_VALUE, reply_complete=True, reply=b"", source_file=""),
    ],
)
def test_what_is_not_certain_has_no_place(call: Any) -> None:
    violations = [refused("socket"), refused("execve")]
    outcome.locate(call, violations)
    assert [each.explanation.file for each in violations if each.explanation] == [None, None]


def test_a_file_that_the_sandbox_could_not_read_is_the_callers_own() -> None:
    line = Path(__file__).read_text().splitlines().index('        ("socket", "connection = socket.socket()"),') + 1
    violations = [refused("socket")]
    outcome.locate(call_that_raised("", file=__file__, line=line), violations)
    assert violations[0].explanation is not None
    assert violations[0].explanation.line == line


def test_a_forged_place_is_escaped() -> None:
    violations = [refused("socket")]
    outcome.locate(call_that_raised("socket()", file="\x1b[2J" * 5000), violations)
    assert violations[0].explanation is not None
    assert violations[0].explanation.text().isprintable()
    assert len(violations[0].explanation.text()) < 1500


# -- what the command says at the end ------------------------------------------------------------------------------------


def record(explanation: Explanation | None, **details: Any) -> SandboxViolation:
    kind = SandboxViolationType.RESOURCE_EXCEEDED
    return SandboxViolation(kind, "m", datetime.now(UTC), details=details, explanation=explanation)


def test_equal_refusals_are_one_line() -> None:
    violations = [
        record(kernel("bpf"), count=2),
        record(limited("memory", 64, refused=False)),
        record(None),
        record(explain("sockets")),
        record(explain("sockets", file="p.py", line=3), count=4),
    ]
    assert refusals.lines(violations, None) == [
        f"at least 2 times: {kernel('bpf')}",
        f"at least 5 times: {explain('sockets', file='p.py', line=3)}",
    ]


def test_a_limit_that_ended_it_is_told_once() -> None:
    error = ResourceLimitExceededError("x", explanation=limited("time", 1))
    assert refusals.lines([], error) == [limited("time", 1).text()]
    assert refusals.lines([record(limited("time", 1))], error) == [limited("time", 1).text()]
    assert refusals.lines([], ResourceLimitExceededError("x")) == []


def test_at_most_five_kinds() -> None:
    names = ("bpf", "mount", "unshare", "ptrace", "kcmp", "iopl", "ioperm")
    told = refusals.lines([record(kernel(name)) for name in names], None)
    assert len(told) == refusals.MOST + 1
    assert told[-1] == "and 2 more kinds: see --result-file"
    assert refusals.lines([record(kernel(name)) for name in names[:6]], None)[-1] == "and 1 more kind: see --result-file"
    assert len(refusals.lines([record(kernel(name)) for name in names[:5]], None)) == refusals.MOST


def test_names_in_a_message_make_the_parser_warn_of_nothing() -> None:
    """It would quote a character of the plugin as it is, in the caller's own process."""
    hostile = "'\\\x0e'"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ast.literal_eval(hostile)
        assert len(seen) == 1
        assert outcome._quoted(f"{hostile} and '/etc/it\\'s\\n' -> b'/\\xff'")[-1] == "/\\udcff"
        assert outcome._quoted("[Errno 13] Permission denied: '/etc/it\\'s\\x01'") == ["/etc/it's\\x01"]
        assert len(seen) == 1

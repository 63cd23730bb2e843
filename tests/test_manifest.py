"""Manifests: mistakes with their lines, hostile files, and what a plugin gets of what it asks for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest

from sandbox import network
from sandbox.config import MAX_FILE_BYTES, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, SecurityLevel
from sandbox.engine import access
from sandbox.errors import ManifestError
from sandbox.plugins import effective as rules
from sandbox.plugins.effective import RULES, effective
from sandbox.plugins.files import PluginFiles
from sandbox.plugins.lines import toml_keys
from sandbox.plugins.manifest import ENTRY_POINTS, TABLES, Manifest, module_file, of, parse


def toml(text: str | bytes) -> Manifest:
    return parse("it", "it.toml", text.encode() if isinstance(text, str) else text)


def as_json(text: str | bytes) -> Manifest:
    return parse("it", "it.json", text.encode() if isinstance(text, str) else text)


FULL = {
    "name": "It",
    "version": "1.2",
    "description": "two\nlines",
    "entry_point": "lib.work:start",
    "sha256": {"main.py": "A" * 64},
    "limits": {"max_memory_mb": 64},
    "permissions": {"security_level": "high", "allowed_ports": [80]},
    "isolation": {"level": "strict"},
}
FULL_TOML = """
name = "It"
version = "1.2"
description = '''two
lines'''
entry_point = "lib.work:start"
sha256 = { "main.py" = "%s" }
[limits]
max_memory_mb = 64
[permissions]
security_level = "high"
allowed_ports = [80]
[isolation]
level = "strict"
""" % ("A" * 64)


def test_both_kinds_say_the_same() -> None:
    expected = Manifest(
        name="It",
        version="1.2",
        description="two\nlines",
        module="lib.work",
        functions=("start",),
        limits={"max_memory_mb": 64.0},
        permissions={"security_level": SecurityLevel.HIGH, "allowed_ports": [80]},
        isolation={"level": IsolationLevel.STRICT},
        sha256={"main.py": "a" * 64},
    )
    assert toml(FULL_TOML) == expected
    assert as_json(json.dumps(FULL)) == expected
    assert as_json(b"\xef\xbb\xbf" + json.dumps(FULL).encode()) == expected


def test_nothing_needs_to_be_said() -> None:
    assert toml("") == as_json("{}") == Manifest("it")
    assert Manifest("it").functions == ENTRY_POINTS == ("main", "run", "execute")
    plugin = PluginFiles("it", {"it.py": b""}, "")
    assert of(plugin) == Manifest("it")


def test_every_field_can_be_asked_for() -> None:
    for table, cls in TABLES.items():
        given = {}
        for field in dataclasses.fields(cls()):
            value = getattr(cls(), field.name)
            given[field.name] = value.value if isinstance(value, Enum) else value
        given.pop("max_io_mb_per_second", None)  # None: not to be said in a file
        given.pop("sandbox_user", None)
        asked = getattr(as_json(json.dumps({table: given})), table)
        assert asked == {name: getattr(cls(), name) for name in given}


# Mistakes


TOML_MISTAKES = [
    (
        'name = "a"\n\n[limits]\n# c\nmax_memory_mb = -5',
        5,
        "[limits] max_memory_mb is -5: give a number of megabytes from 8 to ",
    ),
    ('description = """\n[limits]\nmax_memory_mb = 1\n"""\n[limits]\nmax_memory_mb = 2', 6, "[limits] max_memory_mb is 2: "),
    ("description = '''\n\\'''\n[limits]\nmax_memory_mb = 2", 4, "[limits] max_memory_mb is 2: "),
    ("limits = { max_memory_mb = 3 }", 1, "[limits] max_memory_mb is 3: "),
    ("\nlimits.max_memory_mb = 3", 2, "[limits] max_memory_mb is 3: "),
    ("\n[\"lim\\u0069ts\"]\n'max_memory_mb' = 3", 3, "[limits] max_memory_mb is 3: "),
    (
        "[permissions]\nallowed_ports = [ # c ]\n 80,\n 443 ]\nallowed_hosts = 3",
        5,
        "[permissions] allowed_hosts is 3 (int): give a",
    ),
    ("[permissions]\nallowed_ports = [80, 0]", 2, "[permissions] allowed_ports[1] is 0: give a whole number"),
    ("[limits]\nmax_memory = 1", 2, "unknown key max_memory in [limits]: did you mean max_memory_mb?"),
    ("[limits]\nlevel = 'strict'", 2, "unknown key level in [limits]: put it into [isolation]"),
    ("[isolation]\nlevel = 'stritc'", 2, "[isolation] level is 'stritc': give one of minimal, standard, strict, maximum, did "),
    (
        "[limits]\n\nmemory_warning_threshold_mb = 500",
        3,
        "[limits] memory_warning_threshold_mb is 500.0: give at most max_memory_mb",
    ),
    ("\nlevel = 'strict'", 2, "unknown key level: put it into [isolation]"),
    ("\n\n[limit]", 3, "unknown table [limit]: did you mean limits?"),
    ("\n[[limits]]\nmax_memory_mb = 8", 2, "limits is [{'max_memory_mb': 8}]: make it a table, [limits]"),
    ("a = 1\n\n a = 2\n", 3, "this is not valid TOML: Cannot overwrite a value"),
    ("name = 'a'\nname", 2, "this is not valid TOML: "),
    ("[limits]\n[limits]\nx = 1", 2, "this is not valid TOML: "),
    ("\n\nname = 3", 3, "name is 3: give a text of one line"),
    ("version = 1.0", 1, "version is 1.0: give a text of one line"),
    ('name = "a\\nb"', 1, "name is 'a\\nb': give a text of one line"),
    ('name = "\\u001b[2J"', 1, "name is '\\x1b[2J': give a text of one line"),
    ('name = "\\u202e"', 1, "name is '\\u202e': give a text of one line"),
    ('name = " "', 1, "name is ' ': give a text"),
    (f'name = "{"a" * 201}"', 1, "name is 'aaa"),
    ('description = "a\\u0000"', 1, "description is 'a\\x00': give a text of at most 10,000 characters, without NUL"),
    ("description = 3", 1, "description is 3: give a text"),
    *(
        (f"entry_point = {value}", 1, "entry_point is ")
        for value in ('""', '":"', '"a:"', '":a"', '"a:b:c"', '"a.b"', "3", "[]")
    ),
    *(
        (f"entry_point = {value}", 1, "entry_point is ")
        for value in ('"../x:a"', '"a/b:c"', '".a:c"', '"import"', '"a b"', '"é"')
    ),
    *(
        (f"sha256 = {value}", 1, "sha256 is ")
        for value in ('"x"', "{}", '{ "a" = 1 }', '{ "a" = "00" }', "{ a = '" + "g" * 64 + "' }")
    ),
    ("x = " + "9" * 5000, None, "this is not valid TOML: Exceeds the limit (4300 digits) for integer string conversion"),
    ("x = " + "[" * 100_000, None, "this is not valid TOML: nested too deeply"),
    ("\n" + ".".join("a" * 100) + " = 1", 2, "there are more than 32 dots: "),
    ("name = 'a'\n\0", 2, "there is a NUL character: save it as UTF-8 text"),
    ("name = 'a'".encode("utf-16-le"), 1, "there is a NUL character: save it as UTF-8 text"),
]
JSON_MISTAKES = [
    (
        '{"name": "a",\n\n "limits": {"max_output_mb": 1,\n "max_memory_mb": -5}}',
        4,
        "[limits] max_memory_mb is -5: give a number",
    ),
    ('{"description": "\\"limits\\": {\\n",\n"limits":\n{"max_memory_mb"\n:1}}', 4, "[limits] max_memory_mb is 1: "),
    ('{"permissions": {"allowed_ports": [80,\n 443],\n"allowed_hosts": 3}}', 3, "[permissions] allowed_hosts is 3 (int): "),
    ('{"isolation": {"level": "strict"}, "limits": {},\n"naem": 1}', 2, "unknown key naem: did you mean name?"),
    ('{"limits": {"max_memory_mb": NaN}}', 1, "[limits] max_memory_mb is nan: "),
    ('{"limits":\n[]}', 1, "limits is []: make it a table, [limits]"),
    ('{"name": "a",\n"name": "b"}', 2, "name is there for a second time: remove one of them"),
    ('{"name": "a",\n"n\\u0061me": "b"}', 2, "name is there for a second time"),
    ('{"limits": {"max_memory_mb": 9,\n\n"max_memory_mb": 8}}', 3, "max_memory_mb is there for a second time"),
    ('{"a":' * 9 + '{"b": 1, "b": 2}' + "}" * 9, 1, "this is nested too deeply for a manifest"),
    # Were each key sought among those before it, that would take minutes.
    (
        "{" + ",\n".join(f'"k{number}": 1' for number in (*range(40_000), 39_999)) + "}",
        40_001,
        "k39999 is there for a second time",
    ),
    ('{"name": "\\ud800"}', 1, "name is '\\ud800': give a text"),
    ('{"description": "\\ud800"}', 1, "description is '\\ud800': give a text"),
    ("[1]", 1, 'this is no JSON object: begin with "{"'),
    ("null", 1, 'this is no JSON object: begin with "{"'),
    ("", 1, "this is not valid JSON: "),
    ('{"name":\n}', 2, "this is not valid JSON: Expecting value"),
    ('{"name": "a\n"}', 1, "this is not valid JSON: Invalid control character"),
    ("[" * 100_000, None, "this is not valid JSON: nested too deeply"),
    ('{"a":' * 100_000, None, "this is not valid JSON: nested too deeply"),
    ('{"version": ' + "9" * 5000 + "}", None, "there is a number of too many digits"),
    ('{"name": "a"}\n\0', 2, "there is a NUL character"),
]
MISTAKES = [("it.toml", *each) for each in TOML_MISTAKES] + [("it.json", *each) for each in JSON_MISTAKES]


@pytest.mark.parametrize(("name", "text", "line", "reason"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_told_with_its_line(name: str, text: str | bytes, line: int | None, reason: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse("it", name, text.encode() if isinstance(text, str) else text)
    said = str(caught.value)
    assert said.startswith(f"{name}, line {line}: {reason}" if line is not None else f"{name}: {reason}")
    assert (caught.value.path, caught.value.line) == (name, line)
    assert said.isprintable()
    assert len(said) < 500


@pytest.mark.parametrize("name", ["it.toml", "it.json"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"#" * (MAX_FILE_BYTES + 1), " is larger than 1 MB: "),
        (b"\n\xff", " is not UTF-8 (line 2, byte 1): save it as UTF-8"),
        ("{}".encode("utf-16"), " is not UTF-8 (line 1, byte 0): save it as UTF-8"),
    ],
    ids=range(3),
)
def test_files_that_are_no_text(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse("it", name, data)
    assert str(caught.value).startswith(name + reason)


def test_a_hostile_name_of_a_manifest_is_escaped() -> None:
    with pytest.raises(ManifestError, match=r"^\\x1b\.toml, line 1: "):
        parse("it", "\x1b.toml", b"x")


LONG = [
    "x = " + "[" * 400 + "]" * 400,
    "x = '''" + "a" * 1_000_000 + "'''",
    'x = "' + "\\\\" * 500_000 + '"',
    "x = [\n" + "1,\n" * 100_000 + "]",
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_a_key_behind_a_long_value_is_found(text: str) -> None:
    found = list(toml_keys(f"{text}\nname = 3"))
    assert found == [(("x",), 1), (("name",), text.count("\n") + 2)]


def test_the_module_of_the_entry_point_is_in_the_plugin() -> None:
    said = ("it/plugin.toml", b'name = "It"\nentry_point = "lib.work:start"')
    for path in ("lib/work.py", "lib/work/__init__.py"):
        plugin = PluginFiles("it", {"main.py": b"", path: b""}, "", said)
        manifest = of(plugin)
        assert (manifest.module, manifest.functions) == ("lib.work", ("start",))
        assert module_file(plugin, manifest.module) == path
        assert module_file(plugin, None) == "main.py"
    with pytest.raises(ManifestError) as caught:
        of(PluginFiles("it", {"main.py": b""}, "", said))
    assert str(caught.value).startswith("it/plugin.toml, line 2: entry_point is 'lib.work:start': there is no lib/work.py or ")


# What a plugin gets


def test_every_field_has_a_rule() -> None:
    assert set(RULES) == set(TABLES.values())
    for cls, table in RULES.items():
        assert list(table) == [field.name for field in dataclasses.fields(cls)]
    assert rules.__doc__ is not None
    named = {rule.__name__ for table in RULES.values() for rule in table.values()}
    assert all(f"    {name} " in rules.__doc__ for name in named)


def combined(asked: dict[str, Any], **host: Any) -> tuple[IsolationConfig, PluginLimitsV2, PluginPermissionsV2]:
    return effective(
        Manifest("it", **asked),
        host.get("config", IsolationConfig()),
        host.get("limits", PluginLimitsV2()),
        host.get("permissions", PluginPermissionsV2()),
    )


def test_who_asks_for_nothing_gets_what_the_host_allows() -> None:
    host = (
        IsolationConfig(IsolationLevel.MINIMAL, violation_threshold=7, preload=("json",)),
        PluginLimitsV2(max_memory_mb=999, max_io_mb_per_second=3, memory_warning_threshold_mb=1),
        PluginPermissionsV2(allowed_hosts=["*"], allow_network_access=True, sandbox_user="nobody"),
    )
    got = effective(Manifest("it"), *host)
    assert got == host
    assert got[2].allowed_hosts is not host[2].allowed_hosts


SAMPLES: dict[Callable[..., Any], list[tuple[Any, Any, Any]]] = {
    rules.SMALLER: [(100, 50, 50), (50, 100, 50), (50, 50, 50)],
    rules.BOTH: [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
    rules.EITHER: [(True, True, True), (True, False, True), (False, True, True), (False, False, False)],
}
EVERY = [(cls, name) for cls, table in RULES.items() for name, rule in table.items() if rule in SAMPLES]


@pytest.mark.parametrize(("cls", "name"), EVERY, ids=[f"{cls.__name__}.{name}" for cls, name in EVERY])
def test_numbers_and_switches_combine(cls: type[Any], name: str) -> None:
    scale = {"violation_threshold": 10, "resource_check_interval_seconds": 2}.get(name, 1)
    derived = {"memory_warning_threshold_mb": "max_memory_mb", "cpu_warning_threshold_percent": "max_cpu_percent"}
    derived["execution_warning_threshold_seconds"] = "max_execution_time_seconds"
    more = {derived[name]: 100} if name in derived else {}
    which = next(key for key, kind in TABLES.items() if kind is cls)
    for host, asked, expected in SAMPLES[RULES[cls][name]]:
        given = [
            value
            if isinstance(value, bool)
            else (float if type(getattr(cls(), name)) in (float, type(None)) else int)(value / scale)
            for value in (host, asked)
        ]
        wanted = expected if isinstance(expected, bool) else expected / scale
        host_key = "config" if which == "isolation" else which
        got = combined({which: {name: given[1], **more}}, **{host_key: cls(**{name: given[0], **more})})
        found = getattr(got[("isolation", "limits", "permissions").index(which)], name)
        assert found == wanted


def changed(config: IsolationConfig, name: str, value: object) -> IsolationConfig:
    setattr(config, name, value)
    return config


@pytest.mark.parametrize("name", ["auto_recovery_enabled", "telemetry_enabled"])
@pytest.mark.parametrize("value", [True, False])
def test_some_switches_are_the_hosts_alone(name: str, value: bool) -> None:
    config, _, _ = combined({"isolation": {name: not value}}, config=changed(IsolationConfig(), name, value))
    assert getattr(config, name) is value


def test_user_and_preload_are_the_hosts_alone() -> None:
    config, _, permissions = combined({"permissions": {"sandbox_user": "root"}, "isolation": {"preload": ("os",)}})
    assert (permissions.sandbox_user, config.preload) == (None, ())


@pytest.mark.parametrize("cls", [IsolationLevel, SecurityLevel])
def test_the_stricter_level_holds(cls: type[Enum]) -> None:
    members = list(cls)
    for host in members:
        for asked in members:
            if isinstance(host, IsolationLevel):
                found: object = combined({"isolation": {"level": asked}}, config=IsolationConfig(host))[0].level
            else:
                permissions = PluginPermissionsV2(security_level=host)  # type: ignore[arg-type]
                found = combined({"permissions": {"security_level": asked}}, permissions=permissions)[2].security_level
            assert found is members[max(members.index(host), members.index(asked))]


def test_no_limit_of_the_hosts_is_no_limit_only_where_none_is_asked_for() -> None:
    assert combined({"limits": {"max_io_mb_per_second": 5.0}})[1].max_io_mb_per_second == 5
    host = PluginLimitsV2(max_io_mb_per_second=2)
    assert combined({"limits": {"max_io_mb_per_second": 5.0}}, limits=host)[1].max_io_mb_per_second == 2


@pytest.mark.parametrize(
    ("host", "asked", "expected"),
    [
        ((128, None), {"max_memory_mb": 64.0}, (64, 48)),
        ((128, 10), {"max_memory_mb": 64.0}, (64, 10)),
        ((128, None), {"max_memory_mb": 1000.0}, (128, 96)),
        ((128, None), {"max_memory_mb": 100.0, "memory_warning_threshold_mb": 100.0}, (100, 96)),
        ((64, None), {"memory_warning_threshold_mb": 100.0}, (64, 48)),
        ((64, None), {"memory_warning_threshold_mb": 9.0}, (64, 9)),
    ],
)
def test_a_threshold_follows_its_limit(host: tuple[Any, Any], asked: dict[str, float], expected: tuple[float, float]) -> None:
    limits = PluginLimitsV2(max_memory_mb=host[0], memory_warning_threshold_mb=host[1])
    got = combined({"limits": asked}, limits=limits)[1]
    assert (got.max_memory_mb, got.memory_warning_threshold_mb) == expected


def test_to_ask_for_no_process_is_no_contradiction() -> None:
    limits, permissions = PluginLimitsV2(max_subprocess_count=5), PluginPermissionsV2(allow_subprocess_execution=True)
    _, less, allowed = combined({"limits": {"max_subprocess_count": 0}}, limits=limits, permissions=permissions)
    assert (less.max_subprocess_count, allowed.allow_subprocess_execution) == (0, False)


LISTS: list[tuple[str, list[Any], list[Any], list[Any]]] = [
    ("allowed_directories", ["/srv/a", "/srv/b/"], ["/srv/b", "/srv"], ["/srv/b/"]),
    ("allowed_directories", ["/srv/a"], ["/srv/a/../a/."], ["/srv/a"]),
    ("allowed_directories", ["/srv/a"], ["/srv/a/inner", "/", "/srv/ab", "/srv/a/../../etc"], []),
    ("allowed_directories", ["/srv/a"], [], []),
    ("allowed_directories", [], ["/srv/a"], []),
    ("blocked_directories", ["/a"], ["/b", "/a"], ["/a", "/b"]),
    ("readable_paths", ["/srv/a", "/srv/b/"], ["/srv/b", "/srv", "/srv/a/inner"], ["/srv/b/"]),
    ("allowed_ports", [80, 443], [443, 22], [443]),
    ("allowed_ports", [80], [22], []),
    ("blocked_hosts", ["a.example"], ["b.example"], ["a.example", "b.example"]),
    ("allowed_modules", [], ["json"], ["json"]),
    ("allowed_modules", ["json"], [], ["json"]),
    ("allowed_modules", ["os", "json"], ["os.path", "sys", "jsonx"], ["os.path"]),
    ("allowed_modules", ["json"], ["sys"], ["json"]),  # an empty list would allow all
    ("blocked_modules", ["os"], ["sys"], ["os", "sys"]),
    ("allowed_hosts", ["a.example", "b.example"], ["b.example", "c.example"], ["b.example"]),
    ("allowed_hosts", ["a.example"], ["*", "sub.a.example"], []),
    ("allowed_hosts", [], ["a.example"], []),
    ("allowed_hosts", ["*"], ["a.example", "*"], ["a.example", "*"]),
    ("allowed_hosts", ["*"], ["8.8.8.8", "2a00:1450::1"], ["8.8.8.8", "2a00:1450::1"]),
    (
        "allowed_hosts",
        ["*"],
        ["10.0.0.1", "127.0.0.1", "::1", "0.0.0.0", "169.254.169.254", "::ffff:10.0.0.1", "8.0.0.0/8"],
        [],
    ),
    (
        "allowed_hosts",
        ["10.0.0.0/8"],
        ["10.1.2.3", "10.1.0.0/16", "10.0.0.0/8", "0.0.0.0/0", "11.0.0.1"],
        ["10.1.2.3", "10.1.0.0/16", "10.0.0.0/8"],
    ),
    ("allowed_hosts", ["10.1.0.0/16"], ["10.0.0.0/8"], []),
    ("allowed_hosts", ["2001:db8::/32"], ["2001:db8::1", "2001:db9::1", "10.0.0.1"], ["2001:db8::1"]),
    ("allowed_hosts", ["0.0.0.0/0"], ["::1", "::/0"], []),
    ("allowed_hosts", ["a.example:443"], ["a.example:443", "a.example", "a.example:80"], ["a.example:443"]),
    ("allowed_hosts", ["a.example"], ["a.example:443", "a.example:22"], ["a.example:443"]),
    ("allowed_hosts", ["*:443"], ["a.example:443", "a.example", "*"], ["a.example:443"]),
    ("allowed_hosts", ["10.0.0.1:22"], ["10.0.0.1:22", "10.0.0.0/24:22"], ["10.0.0.1:22"]),
]


@pytest.mark.parametrize(("name", "host", "asked", "expected"), LISTS, ids=range(len(LISTS)))
def test_lists_combine(name: str, host: list[Any], asked: list[Any], expected: list[Any]) -> None:
    permissions = PluginPermissionsV2(**{name: host})  # type: ignore[arg-type]
    checked = getattr(PluginPermissionsV2(**{name: asked}), name)  # type: ignore[arg-type]
    got = combined({"permissions": {name: checked}}, permissions=permissions)[2]
    assert getattr(got, name) == expected
    assert getattr(permissions, name) == host


PLACES = ["*", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "8.8.8.8", "8.0.0.0/8", "::1", "2a00::/16", "127.0.0.1", "0.0.0.0/0"]
ENTRIES = [network.join(place, port) for place in PLACES for port in (0, 22, 443)]
TARGETS = [
    "10.1.2.3",
    "10.9.9.9",
    "8.8.8.8",
    "8.9.9.9",
    "::1",
    "2a00::5",
    "127.0.0.1",
    "1.1.1.1",
    "192.168.0.1",
    "::ffff:10.1.2.3",
]


@pytest.mark.parametrize("asked", ENTRIES)
def test_nothing_is_reached_that_the_host_does_not_allow(asked: str) -> None:
    """By the code that decides on connections."""

    def reached(permissions: PluginPermissionsV2) -> set[tuple[str, int]]:
        hosts = [network.split(host) for host in permissions.allowed_hosts]
        decider = access.Access({"allowed": hosts, "blocked": [], "ports": permissions.allowed_ports}, {})
        return {(text, port) for text in TARGETS for port in (22, 80, 443) if decider.decide(access.parse(text), port)[0]}

    some = 0
    for allowed in ENTRIES:
        host = PluginPermissionsV2(allow_network_access=True, allowed_hosts=[allowed])
        got = combined({"permissions": {"allowed_hosts": [asked]}}, permissions=host)[2]
        assert reached(got) <= reached(host), (allowed, asked)
        some += len(reached(got))
    assert some


def test_the_hosts_settings_are_left_as_they_are() -> None:
    host = (IsolationConfig(), PluginLimitsV2(), PluginPermissionsV2(allowed_ports=[80, 443]))
    before = [repr(each) for each in host]
    effective(Manifest("it", limits={"max_memory_mb": 9.0}, permissions={"allowed_ports": [80]}, isolation={}), *host)
    assert [repr(each) for each in host] == before

"""Property tests: whatever comes in, what reads it answers with a value or with its documented error, in bounded time.

Examples are derived from the properties themselves (derandomize), so that every run tries the same ones. The loop on the
channel's host side is in fuzz_channel.py.
"""

from __future__ import annotations

import datetime
import decimal
import json
import marshal
import math
import os
import pathlib
import string
import tomllib
import tracemalloc
import zlib
from typing import Any

import fuzz_channel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox import (
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    SandboxInitializationError,
    SecurityLevel,
    config,
    host,
    network,
    recipe,
    text,
)
from sandbox.cli import inputs, options
from sandbox.engine import access, channel, codec, failure
from sandbox.errors import ManifestError, ResourceError
from sandbox.plugins import manifest
from sandbox.recipe_data import Recipe
from sandbox.recovery import in_force, spool

few = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=250)

MB = 1 << 20


def sentence(error: Exception) -> None:
    """What a caller is told fits into one line and says something."""
    said = str(error)
    assert said
    assert "\n" not in said
    assert "Traceback" not in said
    assert len(said) < 2000


# -- the codec -----------------------------------------------------------------------------------------------------------

offsets = st.integers(-23 * 3600, 23 * 3600).map(lambda seconds: datetime.timedelta(seconds=seconds))
zones = st.none() | offsets.map(datetime.timezone)
hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1 << 63, 1 << 300)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(), max_size=20)
    | st.binary(max_size=20)
    | st.dates()
    | st.datetimes(timezones=zones)
    | st.times(timezones=zones)
    | st.timedeltas()
    | st.decimals().filter(lambda number: not number.is_snan())  # that has no hash
    | st.fractions()
    | st.uuids()
    | st.lists(st.text("ab./ é", max_size=5), max_size=3).map(lambda parts: pathlib.PurePosixPath(*parts)),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=8,
)
values = st.recursive(
    hashable | st.binary(max_size=20).map(bytearray) | st.decimals(allow_nan=True),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=4)
    ),
    max_leaves=25,
)


def same(one: Any, other: Any) -> bool:
    """Equal and of the same types all through; NaN is NaN, and 0.0 is not -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (one == other and math.copysign(1, one) == math.copysign(1, other))
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, decimal.Decimal):
        return str(one) == str(other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
    if isinstance(one, (set, frozenset)):
        left = list(other)
        for each in one:
            found = next((at for at, candidate in enumerate(left) if same(each, candidate)), None)
            if found is None:
                return False
            del left[found]
        return not left
    if isinstance(one, (datetime.datetime, datetime.time)):
        return bool(one == other) and one.utcoffset() == other.utcoffset() and one.fold == other.fold
    return bool(one == other)


@many
@given(values)
def test_a_value_comes_back_as_it_was(value: object) -> None:
    assert same(codec.decode(codec.encode(value), max_bytes=MB), value)


def decoded(data: bytes) -> object:
    try:
        return codec.decode(data, max_bytes=MB, max_nodes=10_000)
    except codec.CodecError as error:
        sentence(error)
        return None


@many
@given(st.binary(max_size=300))
def test_bytes_are_a_value_or_a_codec_error(data: bytes) -> None:
    decoded(data)
    decoded(b"psi1" + data)


@many
@given(st.lists(st.binary(max_size=40), min_size=6, max_size=6))
def test_columns_are_a_value_or_a_codec_error(columns: list[bytes]) -> None:
    """A right head, so that what is wrong is in the columns, whose numbers are whole."""
    sizes = (1, 4, 8, 8, 1, 1)
    cut = [column[: len(column) // size * size] for column, size in zip(columns, sizes, strict=True)]
    head = b"".join(len(column).to_bytes(4, "little") for column in cut)
    decoded(b"psi1" + head + b"".join(cut))


@st.composite
def damaged(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes with some of them changed, left out or put in."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@many
@given(damaged(values.map(codec.encode)))
def test_a_damaged_value_is_a_value_or_a_codec_error(data: bytes) -> None:
    decoded(data)


def test_what_decoding_takes_is_bounded() -> None:
    """Memory, for the worst that few bytes can ask for: each claims what `max_nodes` allows, or more."""
    begun = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        for op in range(256):
            for kind in b"*123":
                ops = bytes([op, kind]) * 5000
                counts = (9_999).to_bytes(4, "little") + (1).to_bytes(4, "little") * 4999
                columns = ops, counts, bytes(8 * 5000), bytes(8 * 5000), b"a" * 5000, bytes(5000)
                head = b"".join(len(column).to_bytes(4, "little") for column in columns)
                tracemalloc.reset_peak()
                decoded(b"psi1" + head + b"".join(columns))
                assert tracemalloc.get_traced_memory()[1] < 16 * MB, (op, kind)
    finally:
        if not begun:
            tracemalloc.stop()


# -- what workers say besides ------------------------------------------------------------------------------------------------


@many
@given(st.text(max_size=20), st.dictionaries(st.text(max_size=20), st.text(max_size=50) | st.integers(), max_size=5))
def test_a_message_comes_back_as_it_was(kind: str, fields: dict[str, object]) -> None:
    def plain(value: object) -> str:
        return str(value).replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()

    came, seen = channel.unpack(channel.pack(kind, fields))
    assert came == plain(kind)
    assert seen == {plain(name): plain(value) for name, value in fields.items()}


@many
@given(st.binary(max_size=200) | damaged(st.just(failure.encode(OSError(1, "no", "file")))))
def test_bytes_are_a_failure_or_malformed(data: bytes) -> None:
    try:
        found = failure.decode(data)
    except channel.Malformed:
        return
    assert 0 <= found.errno < 10_000
    assert len(found.message) <= failure.MAX_MESSAGE
    assert len(found.type) <= failure.MAX_NAME


@many
@given(st.text(st.characters(), max_size=100))
def test_escaped_text_cannot_drive_a_terminal(said: str) -> None:
    shown = text.escape_text(said, keep="")
    assert not any(ord(character) < 32 or 0x7F <= ord(character) < 0xA0 for character in shown)


# -- manifests and settings --------------------------------------------------------------------------------------------------

KEYS = ("name", "version", "description", "entry_point", "sha256", "limits", "permissions", "isolation", "recovery", "x")
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["main", "a:b", "*"])
fields = st.sampled_from([*config._LIMITS, *config._PERMISSIONS, *config._ISOLATION, "max_memory", "main.py"])
documents = st.dictionaries(
    st.sampled_from(KEYS) | st.text(max_size=5),
    leaves | st.dictionaries(fields, leaves | st.lists(leaves, max_size=3), max_size=3) | st.lists(leaves, max_size=2),
    max_size=5,
)


def toml(document: dict[str, Any]) -> str:
    """As TOML, as far as it can say it; a JSON text is the same there for what both have."""
    lines, tables = [], []
    for key, value in document.items():
        name = json.dumps(key)
        if isinstance(value, dict):
            tables += [f"[{name}]", *(f"{json.dumps(inner)} = {json.dumps(each)}" for inner, each in value.items())]
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join([*lines, *tables])


def parsed(name: str, data: bytes) -> manifest.Manifest | None:
    try:
        found = manifest.parse("plugin", name, data)
    except ManifestError as error:
        sentence(error)
        return None
    assert isinstance(found, manifest.Manifest)
    for table, kind in manifest.TABLES.items():
        kind(**getattr(found, table))  # what was checked is right
    return found


@many
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda said: said.encode("utf-8", "surrogatepass")))
def test_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    parsed("plugin.toml", data)
    parsed("plugin.json", data)


@many
@given(documents)
def test_a_document_is_a_manifest_or_refused(document: dict[str, Any]) -> None:
    parsed("plugin.json", json.dumps(document).encode("utf-8", "surrogatepass"))
    parsed("plugin.toml", toml(document).encode("utf-8", "surrogatepass"))


def test_there_are_documents_that_are_manifests() -> None:
    document = {"name": "a", "limits": {"max_memory_mb": 64}, "isolation": {"level": "strict"}}
    assert tomllib.loads(toml(document)) == document
    assert parsed("plugin.toml", toml(document).encode()) is not None
    assert parsed("plugin.json", json.dumps(document).encode()) == parsed("plugin.toml", toml(document).encode())


@many
@given(st.binary(max_size=200) | documents.map(lambda document: toml(document).encode("utf-8", "surrogatepass")))
def test_bytes_are_a_configuration_or_refused(data: bytes) -> None:
    path = os.memfd_create("psie-fuzz")
    try:
        os.write(path, data)
        config.load_config(f"/proc/self/fd/{path}")
    except (config.ConfigError, ValueError, TypeError) as error:
        sentence(error)
    finally:
        os.close(path)


# -- hosts -------------------------------------------------------------------------------------------------------------------

hosts = (
    st.text(max_size=30)
    | st.text(string.ascii_letters + string.digits + ".-_:[]/*@%xß。．", max_size=40)
    | st.ip_addresses().map(str)
    | st.tuples(st.ip_addresses(), st.integers(0, 140)).map(lambda pair: f"{pair[0]}/{pair[1]}")
    | st.tuples(st.ip_addresses(v=6), st.integers(-1, 70000)).map(lambda pair: f"[{pair[0]}]:{pair[1]}")
    | st.tuples(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}\.){0,3}[a-z]{2,5}", fullmatch=True), st.integers(0, 70000)).map(
        lambda pair: f"{pair[0]}:{pair[1]}"
    )
)


@many
@given(hosts)
def test_a_host_is_understood_once_and_for_all_or_refused(entry: str) -> None:
    try:
        found, port = network.split(entry)
    except ValueError as error:
        sentence(error)
        return
    assert found == found.lower()
    assert found.isascii()
    assert 0 <= port <= 65535
    assert network.split(network.join(found, port)) == (found, port)
    if not network.is_name(found) and found != "*":
        access.Network(found)  # what is no name can be decided on


@many
@given(st.lists(hosts, max_size=3), st.lists(hosts, max_size=3), st.ip_addresses(), st.integers(1, 65535))
def test_what_is_blocked_is_never_allowed(allowed: list[str], blocked: list[str], address: Any, port: int) -> None:
    def understood(entries: list[str]) -> list[tuple[str, int]]:
        found = []
        for entry in entries:
            try:
                found.append(network.split(entry))
            except ValueError:
                continue
        return [(name, port) for name, port in found if name == "*" or not network.is_name(name)]

    lists = {"allowed": understood(allowed), "blocked": [*understood(blocked), (str(address), 0)], "ports": [port]}
    found = access.Access(lists, {}).decide(access.parse(str(address)), port)
    assert found[0] is False


# -- recipes -----------------------------------------------------------------------------------------------------------------

switches = st.booleans()
limits = st.fixed_dictionaries(
    {},
    optional={
        "max_memory_mb": st.floats(8, 4096),
        "max_execution_time_seconds": st.floats(0.001, 1000),
        "max_cpu_percent": st.floats(1, 400),
        "max_file_operations": st.integers(0, 10_000),
        "max_file_size_mb": st.floats(0, 1000),
        "max_network_requests": st.integers(0, 100),
        "max_disk_usage_mb": st.floats(0.01, 1000),
        "max_subprocess_count": st.integers(0, 100),
        "max_thread_count": st.integers(1, 100),
        "max_open_files": st.integers(8, 4096),
        "max_inodes": st.integers(16, 100_000),
        "max_io_mb_per_second": st.none() | st.floats(0.01, 1000),
        "max_output_mb": st.floats(0, 100),
        "max_result_mb": st.floats(0.001, 100),
    },
)
permissions = st.fixed_dictionaries(
    {},
    optional={
        "allow_file_access": switches,
        "allowed_directories": st.lists(st.sampled_from(["/usr/share", "/srv", "/opt", "/nonexistent", "/tmp"]), max_size=2),
        "blocked_directories": st.lists(st.sampled_from(["/usr/share/doc", "/etc", "/srv", "/nonexistent"]), max_size=2),
        "allow_file_creation": switches,
        "allow_file_deletion": switches,
        "allow_network_access": switches,
        "allowed_hosts": st.lists(st.sampled_from(["*", "example.org", "10.0.0.0/8", "[::1]:443"]), max_size=2),
        "blocked_hosts": st.lists(st.sampled_from(["10.0.0.1", "example.com"]), max_size=2),
        "allowed_ports": st.lists(st.integers(1, 65535), max_size=2),
        "allowed_modules": st.lists(st.sampled_from(["json", "os.path"]), max_size=2),
        "blocked_modules": st.lists(st.sampled_from(["socket", "ctypes"]), max_size=2),
        "allow_subprocess_execution": switches,
        "allow_thread_creation": switches,
        "allow_environment_variables": switches,
        "security_level": st.sampled_from(SecurityLevel),
        "sandbox_user": st.sampled_from([None, "nobody", "nobodyelse"]),
        "readable_paths": st.lists(st.sampled_from(["/srv", "/etc/passwd", "/nonexistent", "/proc", "/tmp"]), max_size=2),
    },
)
isolation = st.fixed_dictionaries(
    {"level": st.sampled_from(IsolationLevel)},
    optional={
        "enable_process_isolation": switches,
        "enable_network_isolation": switches,
        "enable_filesystem_isolation": switches,
        "enable_real_time_monitoring": switches,
        "telemetry_enabled": switches,
        "violation_threshold": st.integers(1, 10),
        "watchdog_timeout_seconds": st.integers(5, 300),
        "allow_degraded": switches,
        "require_limits": switches,
    },
)


@few
@given(isolation, limits, permissions)
def test_settings_are_a_recipe_or_refused(chosen: dict[str, Any], most: dict[str, Any], may: dict[str, Any]) -> None:
    try:
        made = recipe.compile(IsolationConfig(**chosen), PluginLimitsV2(**most), PluginPermissionsV2(**may), host.facts())
    except (SandboxInitializationError, ResourceError, ValueError) as error:
        sentence(error)
        return
    plain = json.loads(json.dumps(made.to_dict(), default=list))
    assert Recipe.from_dict(made.to_dict()) == made
    assert set(plain) == set(Recipe.FIELDS)
    assert marshal.loads(marshal.dumps(made.to_dict())) == made.to_dict()  # how it is cached, and travels
    names = [protection.name for protection in made.protections]
    assert len(names) == len(set(names))
    if chosen["level"] in (IsolationLevel.STRICT, IsolationLevel.MAXIMUM) and not chosen.get("allow_degraded"):
        assert {"user", "mnt", "pid", "net"} <= set(made.namespaces)
        assert made.landlock is not None


# -- what psie keeps ---------------------------------------------------------------------------------------------------------

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def record(payload: bytes) -> bytes:
    return spool.MAGIC + len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little") + payload


@many
@given(st.lists(st.binary(max_size=50) | plain_values.map(lambda value: record(marshal.dumps(value, 4))), max_size=4))
def test_a_spool_of_anything(parts: list[bytes]) -> None:
    data = b"".join(parts)
    found, bad = spool.records(data)
    assert all(isinstance(each, dict) for each in found)
    assert 0 <= bad <= len(data)


@many
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), max_size=4), st.binary(max_size=30))
def test_damage_costs_no_other_record(entries: list[dict[str, int]], rubbish: bytes) -> None:
    whole = [record(marshal.dumps(entry, 4)) for entry in entries]
    found, bad = spool.records(rubbish.join([b"", *whole, b""]))
    assert found == entries
    assert bad == len(rubbish) * (len(entries) + 1)


@many
@given(
    st.binary(max_size=100)
    | plain_values.map(lambda value: marshal.dumps(value, 4))
    | st.lists(st.fixed_dictionaries(dict.fromkeys(in_force.FIELDS, plain_values)), max_size=2).map(marshal.dumps)
)
def test_quarantines_of_anything(data: bytes) -> None:
    for content in (data, in_force.MAGIC + data, in_force.MAGIC + zlib.crc32(data).to_bytes(4, "little") + data):
        if content.startswith(in_force.MAGIC + zlib.crc32(data).to_bytes(4, "little")) and not is_plain(data):
            continue  # marshal of its own damage: only whoever can write the file can make that
        found = in_force._parsed(content)
        assert found is None or in_force.find(found, "plugin", "0" * 64) in (None, *found)


def is_plain(data: bytes) -> bool:
    try:
        return data == marshal.dumps(marshal.loads(data), 4) or data == marshal.dumps(marshal.loads(data))
    except (ValueError, TypeError, EOFError):
        return False


# -- the command line --------------------------------------------------------------------------------------------------------

# What execve(2) can hand over: any bytes but NUL, which Python shows as text with lone surrogates.
argument = st.binary(max_size=12).map(lambda data: os.fsdecode(data.replace(b"\0", b""))) | st.text(
    st.characters(exclude_characters="\0", codec="utf-8"), max_size=12
)
words = argument | st.sampled_from(
    [
        *(name for name, _, _, _ in options.RUN),
        *(
            "--level",
            "strict",
            "--memory",
            "64m",
            "-1",
            "--",
            "--env",
            "A=1",
            "--timeout",
            "nan",
            "inf",
            "1e999",
            "--ro",
            "/usr",
        ),
        *("x.py", "--allow-host", "*", "--ports", "80,443", "--json", "--rw", "/nonexistent", "=", "--level=", "--no-such"),
    ]
)


def shown(error: Exception) -> Exception:
    """As `psie` says it."""
    return ValueError(text.escape_text(str(error), keep=""))


@many
@given(st.lists(words, max_size=6))
def test_words_are_options_or_left_to_click(arguments: list[str]) -> None:
    found = options.parse(list(arguments), options.RUN)
    assert found is None or isinstance(found, dict)


@many
@given(st.lists(argument | st.sampled_from(["A=1", "HOME", "=", "A=", "B==c"]), max_size=4))
def test_variables_are_understood_or_refused(entries: list[str]) -> None:
    try:
        found = inputs.environment(tuple(entries))
    except inputs.UsageError as error:
        sentence(shown(error))
        return
    assert all("\0" not in name and "=" not in name and "\0" not in value for name, value in found.items())


@many
@given(st.lists(argument | st.sampled_from(["/usr", "/", "/proc/self", "..", "/etc/passwd", "~"]), max_size=3))
def test_paths_are_understood_or_refused(paths: list[str]) -> None:
    for check in (inputs.readable, inputs.writable):
        try:
            found = check(tuple(paths))
        except inputs.UsageError as error:
            sentence(shown(error))
            continue
        assert all(os.path.isabs(path) and os.path.exists(path) for path in found)


# -- the channel ---------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_the_hosts_side_of_the_channel() -> None:
    """A moment of the loop; `python -m tests.fuzz_channel` runs it for longer."""
    rounds, messages, findings = fuzz_channel.run(4.0, "suite")
    assert not findings, "\n".join(findings)
    assert rounds > 10
    assert messages > 100


def test_a_message_without_sense_ends_its_sandbox() -> None:
    """Of each sender; the call learns whose fault it was."""
    senders: list[tuple[str, str, bytes]] = [
        ("warden", "hub", channel.pack("ended", {"call": "1", "cause": "exit", "used": "0", "status": "many"})),
        ("warden", "hub", b"\xff"),
        ("supervisor", "violations", channel.pack("violation", {"call": "1"})),
        ("zygote", "zygote", channel.pack("closed", {"left": ""})),
    ]
    with fuzz_channel.prepared() as (plan, pid):
        for name, socket, data in senders:
            side = fuzz_channel.Side(plan, pid)
            try:
                channel.send_bytes(side.zygote.inside if socket == "zygote" else getattr(side, socket), data)
                side.hear()
                assert isinstance(side.call.error, ResourceError), name
                assert f"the sandbox's {name} says what makes no sense" in str(side.call.error)
                assert side.sandbox.closing
            finally:
                side.close()

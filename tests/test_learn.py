"""What becomes of what a run was seen to want: grants, refusals, limits, and a file that says so and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import learn, static
from sandbox.cli.plugins import syntax_error
from sandbox.cli.trial import Result
from sandbox.config import load_config
from sandbox.learn import DELETE, HOST, LIMIT, PROCESS, READ, WRITE, Consent, Grant, Peaks, Policy, Seen, Wish

CEILINGS = {"max_memory_mb": 256.0, "max_execution_time_seconds": 10.0}


def policy() -> Policy:
    return Policy("strict", "/plugins/p.py", dict(CEILINGS))


def taken(*wishes: Wish, consent: Consent | None = None, of: Policy | None = None) -> Policy:
    into = of or policy()
    into.take(Seen(list(wishes)), consent or Consent())
    return into


def wish(path: Path | str, word: str = "read", **more: Any) -> Wish:
    kind = WRITE if word in ("write", "make", "delete") else READ
    return Wish(kind, str(path), learn.WORDS[word], **more)


def told(**fields: Any) -> Result:
    return Result(**{"status": 0, **fields})


def note(path: Path | str, word: str, count: int = 1, line: int = 3) -> dict[str, str]:
    return {"wish": word, "path": str(path), "count": str(count), "file": "/plugins/p.py", "line": str(line)}


def violation(setting: str | None, details: dict[str, Any], **explanation: Any) -> dict[str, Any]:
    said = {"setting": setting, "reason": "it is refused", "refused": True, "file": None, "line": None, "toml": None}
    return {"details": details, "explanation": {**said, **explanation}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with some files; two of them are secrets by their names."""
    for name in ("plain/a.txt", "plain/b.txt", "mixed/a.txt", "mixed/.env", "mixed/sub/id_rsa"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    learn.secret_within.cache_clear()
    return tmp_path


# -- text --------------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_toml(text: str) -> None:
    assert tomllib.loads(f"a = {learn.toml(text)}\nb = {learn.toml([text, text])}") == {"a": text, "b": [text, text]}


@given(st.text())
def test_a_comment_is_one_line_whatever_stands_in_it(text: str) -> None:
    assert tomllib.loads(f"{learn.comment(text)}\na = 1") == {"a": 1}


def test_what_toml_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="no Unicode"):
        learn.toml("\udcff")
    with pytest.raises(TypeError, match="cannot be written"):
        learn.toml(None)


@given(st.lists(st.text(min_size=1), max_size=4), st.text(), st.text(), st.lists(st.text(), max_size=3))
def test_a_file_grants_what_the_policy_does_and_nothing_else(
    paths: list[str], refused: str, reason: str, arguments: list[str]
) -> None:
    """Whatever stands in names, reasons and arguments: keys and values are those of the policy."""
    full = Policy("strict", f"/plugins/{reason}", dict(CEILINGS))
    for path in paths:
        if not learn.unwritable_name(f"/{path}"):
            full.grants[READ, f"/{path}"] = Grant(READ, f"/{path}", [Wish(READ, path, reason, 3, refused, 7)])
    full.refused[refused] = reason
    document = tomllib.loads(learn.render(full, learn.limits_for(full, Peaks()), 3, arguments, reason))
    assert document["permissions"] == full.permissions()
    assert document["isolation"] == {"level": "strict"}
    assert set(document["limits"]) == set(learn.limits_for(full, Peaks()))


def test_psie_reads_what_is_written(tmp_path: Path, place: Path) -> None:
    (place / "out").mkdir()
    consent = Consent(files=True, hosts=["example.com", "127.0.0.1:6379"])
    full = taken(
        *(wish(place / "plain/a.txt"), wish(place / "out" / "x", "write"), Wish(PROCESS, "", "new processes")),
        *(Wish(HOST, "example.com", "connections"), Wish(HOST, "127.0.0.1:6379", "connections"), Wish(DELETE, "/x", "deleted")),
        *(Wish(LIMIT, "max_file_size_mb", "passed", amount=80), Wish(LIMIT, "max_open_files", "passed", amount=100)),
        consent=consent,
    )
    (tmp_path / "psie.toml").write_text(learn.render(full, learn.limits_for(full, Peaks(20.0, 1.0, 1 << 20, 3, 2)), 4, []))
    config, limits, permissions = load_config(tmp_path / "psie.toml")
    assert config.level.value == "strict"
    assert (limits.max_memory_mb, limits.max_execution_time_seconds, limits.max_output_mb) == (48, 5, 4)
    assert (limits.max_open_files, limits.max_file_size_mb, permissions.max_file_size_mb) == (100, 80, 80)
    assert limits.max_subprocess_count == learn.SUBPROCESSES
    assert permissions.readable_paths == [str(place / "plain/a.txt")]
    assert permissions.allowed_directories == [str(place / "out")]
    assert permissions.allowed_hosts == ["127.0.0.1:6379", "example.com"]
    assert permissions.allow_network_access
    assert permissions.allow_subprocess_execution
    assert permissions.allow_file_deletion
    assert load_config_of(full.learning(), tmp_path)[2].readable_paths == permissions.readable_paths


def load_config_of(text: str, folder: Path) -> Any:
    (folder / "other.toml").write_text(text)
    return load_config(folder / "other.toml")


# -- what a run tells --------------------------------------------------------------------------------------------------


def test_a_run_tells_what_was_wanted() -> None:
    seen = learn.seen_in(
        told(
            wishes=[note("/a", "read", 2), note("/b/c", "make"), note("notes.txt", "read")],
            violations=[
                violation(
                    "PluginPermissionsV2.allow_subprocess_execution", {"source": "kernel", "count": 4}, file="p.py", line=9
                ),
                violation(
                    "PluginPermissionsV2.allow_network_access",
                    {"operation": "connect", "address": "192.0.2.1", "port": 443, "source": "kernel"},
                ),
                violation(
                    "PluginPermissionsV2.allowed_hosts",
                    {"operation": "resolve", "address": "example.com", "port": 443, "source": "interpreter"},
                ),
                violation(None, {"syscall": "mount"}, reason="seccomp refuses mounts"),
                violation("PluginLimitsV2.max_memory_mb", {}, refused=False, toml="[limits]\nmax_memory_mb = 1"),
            ],
            explanation={"setting": "PluginLimitsV2.max_open_files", "toml": "[limits]\nmax_open_files = 100"},
            changes=[["deleted", "/srv/x", ""], ["added", "/srv/y", ""]],
        ),
        "/nowhere",
    )
    kinds = [(each.kind, each.value, each.count, each.seen) for each in seen.wishes]
    assert kinds == [
        (READ, "/a", 2, learn.PLUGIN),
        (WRITE, "/b/c", 1, learn.PLUGIN),
        (PROCESS, "", 4, learn.KERNEL),
        (HOST, "192.0.2.1:443", 1, learn.KERNEL),
        (HOST, "example.com", 1, learn.PLUGIN),
        (LIMIT, "max_open_files", 1, learn.KERNEL),
        (DELETE, "/srv/x", 1, learn.KERNEL),
    ]
    assert seen.wishes[-2].amount == 100
    assert seen.impossible == ["seccomp refuses mounts: no setting allows it"]
    assert not seen.hints  # there is no such file in that folder


def test_a_relative_name_is_explained_not_granted(place: Path) -> None:
    seen = learn.seen_in(told(wishes=[note("a.txt", "read")]), str(place / "plain"))
    assert not seen.wishes
    assert "workspace" in seen.hints[0]
    assert str(place / "plain/a.txt") in seen.hints[0]


# -- consent -----------------------------------------------------------------------------------------------------------


def test_a_wish_alone_opens_nothing(place: Path) -> None:
    got = taken(
        *(wish(place / "plain/a.txt"), wish(place / "plain/new", "write")),
        *(Wish(HOST, "192.0.2.1:443", "connections"), Wish(HOST, "example.com", "connections")),
    )
    assert not got.grants
    assert set(got.refused) == {
        f"read {place}/plain/a.txt",
        f"write {place}/plain/new",
        "connect to 192.0.2.1:443",
        "connect to example.com",
    }


def test_what_is_named_is_granted_as_a_whole_if_it_holds_no_secret(place: Path) -> None:
    consent = Consent(named=[str(place / "plain"), str(place / "mixed")])
    assert taken(wish(place / "plain/a.txt"), consent=consent).values(READ) == [f"{place}/plain"]
    got = taken(wish(place / "mixed/a.txt"), wish(place / "mixed/.env"), wish(place / "mixed", "list"), consent=consent)
    assert got.values(READ) == [f"{place}/mixed/a.txt"]
    assert set(got.refused) == {f"read {place}/mixed/.env", f"read {place}/mixed"}


def test_a_named_file_that_is_to_be_made_grants_its_folder(place: Path) -> None:
    consent = Consent(named=[str(place / "plain/result.json")])
    assert taken(wish(place / "plain/result.json", "write"), consent=consent).values(WRITE) == [f"{place}/plain"]
    assert not taken(wish(place / "mixed/other", "write"), consent=consent).grants


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/shadow", "/etc/ssh/ssh_host_rsa_key", "/root/.ssh/id_rsa", "/home/somebody/.aws/credentials", "/srv/app/.env"),
        *("/srv/tls/server.KEY", "/srv/x.pem", "/var/run/docker.sock", "/srv/.env.production", "/var/lib/psie/psie.db"),
        os.path.expanduser("~/.ssh/known_hosts"),
        os.path.expanduser("~/.config/gh/hosts.yml"),
    ],
)
def test_secrets_are_known(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "homes", lambda: ["/root", "/home/somebody", os.path.expanduser("~")])
    assert learn.secret(path)


@pytest.mark.parametrize("path", ["/srv/data/report.csv", "/home/somebody/notes.txt", "/usr/share/ca-certificates/a.pem"])
def test_other_files_are_no_secrets(path: str) -> None:
    assert not learn.secret(path)


def test_no_consent_covers_secrets_homes_links_or_the_system(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place / "home"
    (home / "work").mkdir(parents=True)
    (home / "work/a").write_text("x")
    (place / "link").symlink_to(place / "plain")
    monkeypatch.setattr(learn, "homes", lambda: [str(home)])
    consent = Consent(named=[str(place), "/etc", "/"], files=True)
    got = taken(
        *(wish(home, "list"), wish(home / "x", "write"), wish(place / "mixed/.env"), wish(place / "mixed/sub", "list")),
        *(wish(place / "link/a.txt"), wish("/etc/cron.d/x", "write"), wish("/proc/1/environ"), wish("/dev/sda", "write")),
        *(wish("/", "list"), wish("/x", "write"), wish(place / "mixed/x", "write")),
        consent=consent,
    )
    assert not got.grants
    got = taken(wish(home / "work/a"), consent=Consent(files=True))
    assert got.values(READ) == [str(home / "work/a")]


@pytest.mark.parametrize(
    "name", ["a\nb", 'a"]\n[permissions]\nallow_network_access = true\n#', "a\x1b[2Jb", "a\u202eb", "a\udcffb", "x" * 250]
)
def test_a_name_that_cannot_be_shown_is_not_written(place: Path, name: str) -> None:
    folder = place / "x" if len(name) < 200 else place / name
    folder.mkdir()
    path = os.path.join(folder, name)
    with open(os.fsencode(path) if "\udcff" in name else path, "w"):
        pass
    got = taken(wish(path), consent=Consent(files=True))
    assert not got.grants
    assert "characters" in next(iter(got.refused.values()))
    assert tomllib.loads(learn.render(got, learn.limits_for(got, Peaks()), 1, [name]))["permissions"] == {}


@pytest.mark.parametrize(
    ("wanted", "hosts", "network", "is_granted"),
    [
        ("example.com", [], False, False),
        ("example.com", ["example.com"], False, True),
        ("evil.example.com", ["example.com"], False, False),
        ("example.com:22", ["example.com"], False, False),
        ("192.0.2.1:443", ["192.0.2.0/24"], False, True),
        ("8.8.8.8:53", [], True, True),
        ("example.com", [], True, True),
        ("10.0.0.1:80", [], True, False),
        ("169.254.169.254:80", [], True, False),
        ("127.0.0.1:6379", [], True, False),
        ("localhost:6379", [], True, False),
        ("[::1]:80", [], True, False),
        ("127.0.0.1:6379", ["127.0.0.1:6379"], False, True),
        ("*", [], True, False),
        ("10.0.0.0/8", [], True, False),
    ],
)
def test_hosts_need_consent(wanted: str, hosts: list[str], network: bool, is_granted: bool) -> None:
    got = taken(Wish(HOST, wanted, "connections"), consent=Consent(hosts=hosts, network=network))
    assert got.values(HOST) == ([wanted] if is_granted else [])
    assert bool(got.refused) is not is_granted


def test_no_host_is_no_wish() -> None:
    got = taken(Wish(HOST, "a b\n", "connections"), consent=Consent(network=True))
    assert not got.grants


def test_the_person_is_asked_about_what_no_option_allows(place: Path) -> None:
    asked: list[str] = []

    def answer(what: str) -> bool:
        asked.append(what)
        return "a.txt" in what

    consent = Consent(ask=answer)
    got = taken(wish(place / "plain/a.txt"), wish(place / "plain/b.txt"), wish("/etc/shadow"), consent=consent)
    assert got.values(READ) == [f"{place}/plain/a.txt"]
    assert asked == [f"read {place}/plain/a.txt", f"read {place}/plain/b.txt"]  # about a secret nobody is


def test_processes_can_be_refused(place: Path) -> None:
    got = taken(Wish(PROCESS, "", "new processes"), consent=Consent(processes=False))
    assert not got.grants
    assert taken(wish("/usr/bin/env", "look")).values(PROCESS) == [""]  # a program is no file to read


# -- gathering ---------------------------------------------------------------------------------------------------------


def test_many_files_become_their_folder(place: Path) -> None:
    for number in range(learn.MANY_FILES):
        (place / "plain" / f"{number}.csv").write_text("x")
    few = [wish(place / "plain" / f"{number}.csv") for number in range(learn.MANY_FILES - 1)]
    got = taken(*few, consent=Consent(files=True))
    assert len(got.values(READ)) == len(few)
    got = taken(wish(place / "plain" / f"{len(few)}.csv"), consent=Consent(files=True), of=got)
    assert got.values(READ) == [f"{place}/plain"]
    assert len(got.grants[READ, f"{place}/plain"].wishes) == learn.MANY_FILES


def test_what_lies_in_another_grant_is_left_out(place: Path) -> None:
    (place / "plain/deep").mkdir()
    got = taken(
        *(wish(place / "plain/a.txt"), wish(place / "plain/deep/x", "write"), wish(place / "plain/y", "write")),
        consent=Consent(files=True),
    )
    assert (got.values(READ), got.values(WRITE)) == ([], [f"{place}/plain"])


def test_a_folder_that_is_there_is_not_made_but_seen(place: Path) -> None:
    """As by os.makedirs(exist_ok=True), which begins at the first folder that it does not see."""
    named = Consent(named=[str(place / "plain")])
    assert set(taken(wish(place, "make"), consent=named).grants) == {(READ, f"{place}/plain")}
    assert set(taken(wish(place / "plain", "make"), consent=named).grants) == {(READ, f"{place}/plain")}
    got = taken(wish(place, "make"), wish(place / "plain/new", "make"), consent=named)
    assert set(got.grants) == {(WRITE, f"{place}/plain")}
    to_be_made = Consent(named=[str(place / "plain/result.json")])
    assert set(taken(wish(place, "make"), consent=to_be_made).grants) == {(WRITE, f"{place}/plain")}
    assert not taken(wish(place, "look"), consent=to_be_made).grants
    assert not taken(wish(place, "make")).grants


def test_what_is_not_here_either_is_no_wish(place: Path) -> None:
    got = taken(wish(place / "plain/none.txt"), consent=Consent(files=True))
    assert not got.grants
    assert not got.refused


# -- limits ------------------------------------------------------------------------------------------------------------


def test_limits_are_raised_up_to_their_ceilings() -> None:
    got = policy()
    consent = Consent()
    assert got.take(Seen([Wish(LIMIT, "max_open_files", "passed", amount=100)]), consent)
    assert not got.take(Seen([Wish(LIMIT, "max_open_files", "passed", amount=100)]), consent)
    assert got.learning_limits()["max_open_files"] == 100
    assert not got.take(Seen([Wish(LIMIT, "max_memory_mb", "passed", amount=512)]), consent)
    assert "--memory" in got.refused["more max_memory_mb"]


def test_limits_have_headroom() -> None:
    got = learn.limits_for(policy(), Peaks(memory_mb=100.1, seconds=4.0, output_bytes=3 << 20, file_operations=70))
    assert {name: value for name, (value, _) in got.items()} == {
        "max_memory_mb": 208,
        "max_execution_time_seconds": 12,
        "max_output_mb": 12,
        "max_file_operations": 200,
    }


def test_risks_are_named(place: Path) -> None:
    got = taken(
        *(wish(place / "plain/x", "write"), Wish(HOST, "10.0.0.1:80", "connections"), Wish(PROCESS, "", "new processes")),
        consent=Consent(files=True, hosts=["10.0.0.1:80"]),
    )
    text = learn.render(got, {}, 1, [])
    assert text.count("# WARNING") == 4
    assert len(got.warnings()) == 4


# -- psie check: the text ----------------------------------------------------------------------------------------------


def found(source: str) -> list[tuple[str, int, str]]:
    return [
        (each.kind, each.line, each.value or each.name)
        for each in static.findings({"p.py": source.encode()})
        if each.kind != static.MODULE
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import subprocess as s\ns.run(['ls'])", [(static.PROCESS, 2, "subprocess.run")]),
        ("from os import system\nsystem('ls')", [(static.PROCESS, 2, "os.system")]),
        ("import os\nos.execv('/bin/ls', [])", [(static.PROCESS, 2, "os.execv")]),
        ("import urllib.request\nurllib.request.urlopen('http://x')", [(static.NETWORK, 2, "urllib.request.urlopen")]),
        ("import requests", [(static.NETWORK, 1, "requests")]),
        ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", [(static.NEVER, 2, "socket.socket")]),
        ("import socket\nsocket.create_server(('', 1))", [(static.LISTEN, 2, "socket.create_server")]),
        ("open('/etc/motd').read()", [(static.READ, 1, "/etc/motd")]),
        ("open('/srv/x', mode='w')", [(static.WRITE, 1, "/srv/x")]),
        ("from pathlib import Path\nPath('/srv/x').write_text('')", [(static.WRITE, 2, "/srv/x")]),
        ("from pathlib import Path\nPath('/srv/x').open('a')", [(static.WRITE, 2, "/srv/x")]),
        ("import os\nos.listdir('/srv')", [(static.READ, 2, "/srv")]),
        ("open('data.csv')", [(static.LOCAL, 1, "data.csv")]),
        ("open('out.csv', 'w')", []),
        ("import os\nos.environ['TOKEN']; os.getenv('HOME')", [(static.VARIABLE, 2, "TOKEN")]),
        ("import os\nos.environ['TOKEN'] = 'x'", []),
        ("print(1)", []),
        ("print(1", [(static.SYNTAX, 1, "")]),
        ("\0", [(static.SYNTAX, 1, "")]),
        ("x = 1\n" + "(" * 5000, [(static.SYNTAX, 2, "")]),
    ],
)
def test_what_a_text_shows(source: str, expected: list[tuple[str, int, str]]) -> None:
    if expected and expected[0][0] == static.SYNTAX:
        assert [kind for kind, _, _ in found(source)] == [static.SYNTAX]
    else:
        assert found(source) == expected


def test_a_text_that_is_nested_too_deeply_is_said_to_be() -> None:
    (only,) = static.findings({"p.py": b"-" * 200_000 + b"1"})
    assert (only.kind, only.what) == (static.SYNTAX, "cannot be read: it is nested too deeply")


def test_what_is_no_text_is_said_to_be() -> None:
    (only,) = static.findings({"p.py": b"\x7fELF\2\1\1\0" + bytes(2 << 20)})
    assert (only.kind, only.what) == (static.SYNTAX, "is a compiled program (ELF): give a Python file")


def test_a_text_is_only_read(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    static.findings({"p.py": (tmp_path / "p.py").read_bytes()})
    assert not (tmp_path / "made").exists()


@pytest.mark.long
def test_a_text_that_the_parser_takes_long_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is the square of the number of its parts, and no signal of ours interrupts it."""
    monkeypatch.setattr(static, "SECONDS", 1)
    source = b"x = f'" + b"{a}" * 340_000 + b"'"
    before = time.monotonic()
    got = static.findings({"first.py": b"import socket", "long.py": source})
    assert time.monotonic() - before < 20
    assert [(each.file, each.kind) for each in got] == [("first.py", static.MODULE), ("long.py", static.SYNTAX)]
    files: Any = types.SimpleNamespace(files={"first.py": b"import socket", "long.py": source})
    assert syntax_error(files) == "long.py takes longer than 10 s to look at"
    files.files["first.py"] = b"import"
    assert syntax_error(files).startswith("first.py, line 1: ")


def test_warnings_of_the_parser_quote_no_text(tmp_path: Path) -> None:
    """They show the line that they are about as it is, on the terminal of whoever only wants to know what a plugin does."""
    path = tmp_path / "p.py"
    path.write_bytes(b'x = "\\d \x1b]0;title\x07"\n')

    def errors(code: str) -> bytes:
        prelude = f"import ast, pathlib; from sandbox import static; source = pathlib.Path({str(path)!r}).read_bytes(); "
        command = [sys.executable, "-W", "always", "-c", f"{prelude}{code}"]
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stderr

    assert b"\x1b]0;" in errors(f"ast.parse(source, {str(path)!r})")
    assert errors(f"static.findings({{{str(path)!r}: source}})") == b""


# -- names and where they lead -----------------------------------------------------------------------------------------------


def test_a_name_that_leads_to_a_private_address_has_it_asked_for() -> None:
    seen = learn.seen_in(told(leads=[["db.example", "10.0.0.7:5432"]]), "/")
    without, given = policy(), policy()
    without.take(seen, Consent(hosts=["db.example:5432"]))
    assert without.values(HOST) == []
    assert without.refused == {"connect to 10.0.0.7:5432": "allow it by --allow-host 10.0.0.7:5432"}
    given.take(seen, Consent(hosts=["db.example:5432", "10.0.0.7:5432"]))
    assert given.values(HOST) == ["10.0.0.7:5432"]
    assert "db.example leads there" in given.ordered()[0].reason("p.py")


def test_one_port_of_a_host_is_enough_where_only_that_was_named() -> None:
    wanted = Wish(HOST, "example.com", "connections")
    assert taken(wanted, consent=Consent(hosts=["example.com:80"])).values(HOST) == ["example.com:80"]
    assert taken(wanted, consent=Consent(hosts=["example.com"])).values(HOST) == ["example.com"]
    assert taken(wanted, consent=Consent(hosts=["example.com:22"])).values(HOST) == []

"""Where settings come from: one order, each value with its origin; files beside a plugin count once they are accepted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import trusted
from sandbox.cli import beside, settings
from sandbox.cli.inputs import UsageError
from sandbox.config import ConfigError, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.errors import ResourceError
from sandbox.plugins import effective
from sandbox.recovery import private

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records and an environment of its own."""
    monkeypatch.setattr(private, "default_folder", lambda: str(tmp_path / "state"))
    (tmp_path / "plugin.py").touch()
    for name in [name for name in os.environ if name.startswith("SANDBOX_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def writer(name: str, content: str, *, accepted: bool = False) -> Path:
        path = tmp_path / name
        path.write_text(content)
        if accepted:
            trusted.accept(str(path), path.read_bytes())
        return path

    return writer


def gathered(folder: Path, **given: Any) -> settings.Gathered:
    return settings.gathered({"file": str(folder / "plugin.py"), **given})


def memory(found: settings.Gathered) -> tuple[float, str]:
    return found.limits.max_memory_mb, found.origins.get(("limits", "max_memory_mb"), settings.DEFAULT)


def test_a_later_one_wins(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory(gathered(tmp_path)) == (128, "default")
    monkeypatch.setenv("SANDBOX_DEFAULT_MEMORY_MB", "30")
    assert memory(gathered(tmp_path)) == (30, "SANDBOX_DEFAULT_MEMORY_MB")
    project = write("pyproject.toml", "[tool.psie.limits]\nmax_memory_mb = 40\n", accepted=True)
    assert memory(gathered(tmp_path)) == (40, f"{project}, [tool.psie]")
    own = write("psie.toml", "[limits]\nmax_memory_mb = 50\n", accepted=True)
    assert memory(gathered(tmp_path)) == (50, str(own))
    named = write("named.toml", "[limits]\nmax_memory_mb = 60\n")
    assert memory(gathered(tmp_path, config=str(named))) == (60, str(named))
    assert memory(gathered(tmp_path, memory="70M")) == (70, "--memory")
    assert memory(gathered(tmp_path, memory="70M", config=str(named))) == (70, "--memory")


def test_what_nobody_says_anew_is_kept_from_before(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_ISOLATION_LEVEL", "strict")
    write("pyproject.toml", "[tool.psie.limits]\nmax_output_mb = 3\n[tool.other]\nx = 1\n", accepted=True)
    write("psie.toml", '[permissions]\nallow_network_access = true\nallowed_hosts = ["example.com"]\n', accepted=True)
    found = gathered(tmp_path, allow_host=("192.0.2.1:81",), timeout="5")
    assert (found.config.level, found.limits.max_output_mb) == (IsolationLevel.STRICT, 3)
    assert found.limits.max_execution_time_seconds == 5
    assert found.permissions.allowed_hosts == ["example.com", "192.0.2.1:81"]
    assert found.origins["permissions", "allowed_hosts"] == f"{tmp_path / 'psie.toml'}, --allow-host"
    assert found.notes == []


def test_options_are_named(tmp_path: Path) -> None:
    given = {
        "level": "maximum",
        "cpu": "20",
        "pids": "7",
        "allow_subprocess": True,
        "rw": (str(tmp_path),),
        "allow_delete": True,
    }
    found = gathered(tmp_path, **given, allow_degraded=True)
    told = {key: origin for (_, key), origin in found.origins.items()}
    assert told == {
        "level": "--level",
        "allow_degraded": "--allow-degraded",
        "max_cpu_percent": "--cpu",
        "max_thread_count": "--pids",
        "max_subprocess_count": "--pids",
        "allow_subprocess_execution": "--allow-subprocess",
        "allowed_directories": "--rw",
        "allow_file_deletion": "--allow-delete",
    }


def test_what_is_wrong_beside_another_setting_is_told_with_its_name_and_file(tmp_path: Path, write: Write) -> None:
    """As files have it: a class is known to who writes Python."""
    first = write("pyproject.toml", "[tool.psie.limits]\nmemory_warning_threshold_mb = 100\n", accepted=True)
    write("psie.toml", "[limits]\nmax_memory_mb = 64\n", accepted=True)
    with pytest.raises(ConfigError) as caught:
        gathered(tmp_path)
    told = "[limits] memory_warning_threshold_mb is 100.0: give at most max_memory_mb, which is 64"
    assert str(caught.value).startswith(f"{first}, [tool.psie]: {told}, or leave it out")


def test_deletion_needs_a_folder(tmp_path: Path, write: Write) -> None:
    with pytest.raises(UsageError, match=r"^--allow-delete: there is no folder that it may change: give one by --rw DIR, or"):
        gathered(tmp_path, allow_delete=True)
    write("psie.toml", f"[permissions]\nallowed_directories = ['{tmp_path}']\n", accepted=True)
    assert gathered(tmp_path, allow_delete=True).permissions.allow_file_deletion


MORE = """
[isolation]
level = "minimal"
[limits]
max_memory_mb = 1000
max_output_mb = 1
[permissions]
allow_network_access = true
allowed_hosts = ["192.0.2.1"]
allowed_directories = ["/srv"]
readable_paths = ["/etc/hostname"]
blocked_modules = ["ctypes"]
"""


@pytest.mark.parametrize("name", ["psie.toml", "pyproject.toml"])
def test_what_is_not_accepted_only_makes_less(name: str, tmp_path: Path, write: Write) -> None:
    text = MORE if name == "psie.toml" else re.sub(r"^\[", "[tool.psie.", MORE, flags=re.MULTILINE)
    path = write(name, text)
    found = gathered(tmp_path)
    assert found.config.level is IsolationLevel.STANDARD
    assert (found.limits.max_memory_mb, found.limits.max_output_mb) == (128, 1)
    permissions = found.permissions
    assert not permissions.allow_network_access
    assert permissions.allowed_hosts == permissions.allowed_directories == permissions.readable_paths == []
    assert permissions.blocked_modules == ["ctypes"]
    assert "not accepted" in found.origins["limits", "max_output_mb"]
    (note,) = found.notes
    asked = "(level, max_memory_mb, allow_network_access, allowed_hosts, allowed_directories, readable_paths)"
    assert asked in note
    assert f"psie trust {path}" in note
    trusted.accept(str(path), path.read_bytes())
    found = gathered(tmp_path)
    assert (found.config.level, found.permissions.allowed_hosts, found.notes) == (IsolationLevel.MINIMAL, ["192.0.2.1"], [])


def test_options_are_a_persons_own_and_hold(tmp_path: Path, write: Write) -> None:
    write("psie.toml", "[limits]\nmax_memory_mb = 64\n")
    assert memory(gathered(tmp_path, memory="256M")) == (256, "--memory")
    write("psie.toml", '[permissions]\nallow_network_access = true\nallowed_hosts = ["192.0.2.1:80"]\n')
    assert gathered(tmp_path, allow_host=("192.0.2.1:80",)).notes == []


def test_one_that_has_changed_is_not_accepted_any_more(tmp_path: Path, write: Write) -> None:
    path = write("psie.toml", "[limits]\nmax_memory_mb = 200\n", accepted=True)
    assert memory(gathered(tmp_path))[0] == 200
    write("psie.toml", "[limits]\nmax_memory_mb = 201\n")
    assert memory(gathered(tmp_path))[0] == 128
    path.write_text("[limits]\nmax_memory_mb = 200\n")
    assert memory(gathered(tmp_path))[0] == 200
    assert trusted.forget(str(path))
    assert not trusted.forget(str(path))
    assert memory(gathered(tmp_path))[0] == 128
    assert trusted.accepted() == []


def test_accepted_is_a_path_with_its_content(tmp_path: Path, write: Write) -> None:
    path = write("psie.toml", "[limits]\nmax_memory_mb = 200\n", accepted=True)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "plugin.py").touch()
    (other / "psie.toml").write_bytes(path.read_bytes())
    assert memory(gathered(other))[0] == 128
    assert [each.path for each in trusted.accepted()] == [str(path)]


def test_records_that_others_could_have_made_do_not_count(tmp_path: Path, write: Write) -> None:
    path = write("psie.toml", "[limits]\nmax_memory_mb = 200\n", accepted=True)
    (entry,) = (tmp_path / "state" / trusted.FOLDER).iterdir()
    entry.chmod(0o644)
    with pytest.raises(ResourceError, match="open to others"):
        gathered(tmp_path)
    entry.chmod(0o600)
    entry.write_bytes(entry.read_bytes().replace(os.fsencode(path), b"/another"))
    assert memory(gathered(tmp_path))[0] == 128


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "huge", "garbage", "unknown"])
def test_what_is_no_file_of_settings(kind: str, tmp_path: Path, write: Write) -> None:
    """It holds nobody up, and leads nowhere."""
    path = tmp_path / "psie.toml"
    if kind == "link":
        path.symlink_to(write("other.toml", "[limits]\nmax_memory_mb = 20\n"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text({"huge": "#" * (beside.MOST + 1), "garbage": "[", "unknown": "[limits]\nmax_memroy_mb = 3\n"}[kind])
    if kind in ("fifo", "folder"):
        assert memory(gathered(tmp_path)) == (128, "default")
        return
    with pytest.raises(ConfigError) as caught:
        gathered(tmp_path)
    wanted = {
        "link": "it is a link",
        "huge": "larger than",
        "garbage": "not valid TOML",
        "unknown": "did you mean max_memory_mb?",
    }
    assert wanted[kind] in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mend"),
    [
        ('[tool.psie]\nlevel = "strict"\n', r"put it into \[tool.psie.isolation\]"),
        ("[tool.psie]\nlimits = 3\n", r"make it a table, \[tool.psie.limits\]"),
        ("[tool.psie.limits]\nallowed_ports = [3]\n", r"in \[tool.psie.limits\]: put it into \[tool.psie.permissions\]"),
    ],
)
def test_a_mend_for_a_project_names_tables_that_are_read_there(tmp_path: Path, write: Write, content: str, mend: str) -> None:
    write("pyproject.toml", content)
    with pytest.raises(ConfigError, match=mend):
        gathered(tmp_path)


def test_a_pyproject_of_others_is_not_read(tmp_path: Path, write: Write) -> None:
    """One without [tool.psie] may be whatever it likes."""
    write("pyproject.toml", "this is no TOML at all [")
    assert beside.find({"file": str(tmp_path / "plugin.py")}) == []
    write("pyproject.toml", "[tool]\npsie = 3 # [tool.psie\n")
    with pytest.raises(ConfigError, match="is no table"):
        gathered(tmp_path)


@pytest.mark.parametrize("text", ["[tool]\npsie.limits.max_memory_mb = 20\n", "[ tool . psie . limits ]\nmax_memory_mb = 20\n"])
def test_however_a_pyproject_spells_it(text: str, tmp_path: Path, write: Write) -> None:
    write("pyproject.toml", text)
    assert memory(gathered(tmp_path))[0] == 20


def test_a_file_that_comes_meanwhile_is_not_remembered(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was there when the settings were looked for is what counts."""
    plugin = tmp_path / "plugin.py"
    found = beside.find({"file": str(plugin)})
    write("psie.toml", "[limits]\nmax_memory_mb = 200\n", accepted=True)
    assert settings.Gathered({"file": str(plugin)}, found).limits.max_memory_mb == 128


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file away")
@pytest.mark.parametrize("kind", ["file", "unreadable", "link", "of the plugin's owner"])
def test_a_file_of_somebody_else_stops_nobody(kind: str, tmp_path: Path, write: Write) -> None:
    plugin = tmp_path / "plugin.py"
    path = tmp_path / "psie.toml"
    if kind == "link":
        path.symlink_to("/etc/shadow")
    else:
        path.write_text("[limits]\nmax_memory_mb = 20\n")
    os.chown(path, 65534, 65534, follow_symlinks=False)
    if kind == "unreadable":
        path.chmod(0)
    if kind == "of the plugin's owner":
        os.chown(plugin, 65534, 65534)
    assert memory(gathered(tmp_path))[0] == (20 if kind == "of the plugin's owner" else 128)


def test_every_field_has_an_answer_to_asking_for_more() -> None:
    """What the host gives in full is never more; for each field something else is."""
    for kind in (IsolationConfig, PluginLimitsV2, PluginPermissionsV2):
        host = kind()
        assert effective.asks_for_more(host, {name: getattr(host, name) for name in vars(host)}) == []
    assert effective.asks_for_more(PluginPermissionsV2(), {"blocked_hosts": ["a"], "require_code_signing": True}) == []
    assert effective.asks_for_more(PluginPermissionsV2(require_code_signing=True), {"require_code_signing": False}) == [
        "require_code_signing"
    ]
    assert effective.asks_for_more(PluginLimitsV2(), {"max_memory_mb": 128.5, "max_output_mb": 0.5}) == ["max_memory_mb"]

"""`psie plugins`: what lies in a plugin folder, whether it is whole, signed and Python. Nothing of a plugin is run here.

What plugins say of themselves is hostile, and escaped. Status 1: something is wrong with a plugin; 125: the command is.
"""

from __future__ import annotations

import json
import os
import sys

from sandbox import static
from sandbox.cli.run import binary
from sandbox.errors import PluginError, SandboxException
from sandbox.plugins import discovery, files, manifest, signing
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.plugins.files import PluginFiles
    from sandbox.plugins.manifest import Manifest

FAILED = 125
SHOWN_CHARACTERS = 200  # of a description in the table


def listed(folder: str, as_json: bool) -> int:
    try:
        found = discovery.discover(folder)
    except SandboxException as error:
        return complain(error)
    if as_json:
        print(json.dumps([as_data(each) for each in found], indent=2))
        return 0
    from sandbox.cli.table import OK, WRONG, print_table

    rows = []
    for each in found:
        if each.manifest is None:
            rows.append([WRONG, each.id, "", "", str(each.error)])
        else:
            text = " ".join(each.manifest.description.split())
            shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
            rows.append([OK, each.id, each.manifest.name, each.manifest.version, shown])
    print_table(["state", "id", "name", "version", "description"], rows)
    return 0


def as_data(found: discovery.Found) -> dict[str, str | None]:
    said = found.manifest
    return {
        "id": found.id,
        "path": found.path,
        "name": said.name if said else None,
        "version": said.version if said else None,
        "description": said.description if said else None,
        "error": str(found.error) if found.error else None,
    }


def check(folder: str, plugin_id: str | None, trusted_keys: str | None) -> int:
    from sandbox.cli.table import WRONG, print_table

    rows: list[list[str]] = []
    try:
        if plugin_id is None:
            ids = [each.id for each in discovery.discover(folder)]
        else:
            ids = [plugin_id]
            refuse_unknown(folder, plugin_id)
        for each in ids:
            rows += [[state, each, what, detail] for state, what, detail in checks(folder, each, trusted_keys)]
    except SandboxException as error:
        return complain(error)
    print_table(["state", "plugin", "check", "detail"], rows)
    return int(any(row[0] == WRONG for row in rows))


def checks(folder: str, plugin_id: str, trusted_keys: str | None) -> list[tuple[str, str, str]]:
    """(state, check, detail) of each check that could be made."""
    from sandbox.cli.table import ABSENT, OK, WRONG

    rows: list[tuple[str, str, str]] = []
    what = "files"
    try:
        plugin = read(folder, plugin_id)
        count = f"{len(plugin.files)} file{'' if len(plugin.files) == 1 else 's'}"
        rows.append((OK, what, f"{count}, sha256 {plugin.sha256}"))
        what = "syntax"
        wrong = syntax_error(plugin)
        rows.append((WRONG, what, wrong) if wrong else (OK, what, "every .py file compiles"))
        what = "manifest"
        said = manifest.of(plugin)
        rows.append((OK, what, plugin.manifest[0]) if plugin.manifest else (ABSENT, what, "there is none"))
        rows.append(signature_state(plugin, said, trusted_keys))
        what = "digests"
        signing.check_sha256(plugin, said)
        rows.append((OK, what, "as in the manifest") if said.sha256 else (ABSENT, what, "the manifest has none"))
    except PluginError as error:
        rows.append((WRONG, what, str(error)))
    return rows


def signature_state(plugin: PluginFiles, said: Manifest, trusted_keys: str | None) -> tuple[str, str, str]:
    from sandbox.cli.table import ABSENT, OK, WRONG

    found = signing.check(plugin, trusted_keys)
    if found.ok:
        return OK, "signature", f"by the trusted key {found.key}"
    is_wanted = plugin.signature is not None or said.permissions.get("require_code_signing")
    return WRONG if is_wanted else ABSENT, "signature", found.reason


def syntax_error(plugin: PluginFiles) -> str:
    """Where the first file that is no Python is wrong; "" if all are. They are compiled, never executed."""
    sources = [(path, source) for path, source in sorted(plugin.files.items()) if path.endswith(".py")]
    told = static.bounded(error_of(path, source) for path, source in sources)
    if len(told) < len(sources):
        told.append(f"{sources[len(told)][0]} {static.TOO_LONG}")
    return next((each for each in told if each), "")


def error_of(path: str, source: bytes) -> str:
    if b"\0" in source:
        return f"{path} is {binary(source)}"
    if len(source) > static.MOST:
        return f"{path} {static.TOO_LARGE}"
    try:
        compile(source, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"{path}, line {error.lineno}: {error.msg}" if error.lineno else f"{path}: {error.msg}"
    except ValueError as error:
        return f"{path}: {error}"
    except (RecursionError, MemoryError, OverflowError):
        return f"{path}: Python cannot compile it: it is nested too deeply or too large"
    return ""


def sign(folder: str, plugin_id: str, key: str) -> int:
    try:
        refuse_unknown(folder, plugin_id)
        plugin = read(folder, plugin_id)
        signing.check_sha256(plugin, manifest.of(plugin))
        path = signing.write_signature(folder, plugin, signing.sign(plugin, key))
    except SandboxException as error:
        return complain(error)
    print(f"signed {plugin.id} (sha256 {plugin.sha256}): {path}")
    return 0


def keygen(file: str) -> int:
    try:
        print(signing.make_key(file))
    except SandboxException as error:
        return complain(error)
    return 0


def read(folder: str, plugin_id: str) -> PluginFiles:
    opened = files.open_folder(folder)
    try:
        return files.read(opened, plugin_id)
    finally:
        os.close(opened)


def refuse_unknown(folder: str, plugin_id: str) -> None:
    """Raises PluginError for an id that no plugin of the folder has, with the one that may have been meant."""
    import difflib

    ids = [each.id for each in discovery.discover(folder)]
    if plugin_id not in ids:
        near = difflib.get_close_matches(plugin_id[: files.ID_CHARACTERS], ids, 1)
        hint = f"did you mean {near[0]}?" if near else "psie plugins list shows those that there are"
        files.refuse(plugin_id, f"is no plugin of {escape_text(folder, keep='')}: {hint}")


def complain(error: Exception) -> int:
    print(f"psie: {error}", file=sys.stderr)
    return FAILED

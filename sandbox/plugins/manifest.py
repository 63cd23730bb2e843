"""Manifests: what a plugin says of itself, and what it asks for.

`plugin.toml` or `plugin.json` (files.py says where), UTF-8, at most 1 MB:

    name = "Thumbnails"                     # for people; the id if left out
    version = "1.2"
    description = "Makes small pictures of large ones."
    entry_point = "thumbnails:make"         # "function" of the main file, or "module:function"
    sha256 = { "main.py" = "9f86d0..." }    # of every file, if it is there at all

    [limits]                                # the fields of PluginLimitsV2
    [permissions]                           # of PluginPermissionsV2
    [isolation]                             # of IsolationConfig
    [recovery]
    max_memory_mb = 256                     # for a second try, after it was ended for want of memory

The first three tables are checked by sandbox.config, as a --config file is. What they can do is in effective.py.

Host side. It must not know where a manifest came from, nor believe what it says.
"""

from __future__ import annotations

import json
import keyword
from dataclasses import dataclass, field

from sandbox import config
from sandbox.errors import ManifestError
from sandbox.plugins import lines
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, NoReturn

    from sandbox.plugins.files import PluginFiles

ENTRY_POINTS = ("main", "run", "execute")  # of a manifest that names none: the first that the main file has
TABLES = {"limits": config.PluginLimitsV2, "permissions": config.PluginPermissionsV2, "isolation": config.IsolationConfig}
NAME_CHARACTERS = 200
DESCRIPTION_CHARACTERS = 10_000
DEPTH = 8  # objects in objects of JSON
MOST_DOTS = 32  # in a line of TOML: tomllib's time grows with the square of a dotted key's length


@dataclass(frozen=True)
class Manifest:
    """What a plugin says of itself. All of it is the plugin's word: escape it before a person sees it.

    Attributes:
        name: one line, at most 200 characters.
        version: likewise; "" where it does not say.
        description: at most 10,000 characters, may have lines.
        module: the module of the entry point, dotted; None: the main file.
        functions: the entry points to try, in this order.
        limits, permissions, isolation: the fields it asks for, checked, by name; what it does not ask for is not in them.
        retry_memory_mb: the memory it asks for where that of its limits was too little; None: there is no second try.
        sha256: digests in lower case hex by the file's path; empty: it does not say.
    """

    name: str
    version: str = ""
    description: str = ""
    module: str | None = None
    functions: tuple[str, ...] = ENTRY_POINTS
    limits: Mapping[str, Any] = field(default_factory=dict)
    permissions: Mapping[str, Any] = field(default_factory=dict)
    isolation: Mapping[str, Any] = field(default_factory=dict)
    retry_memory_mb: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


def of(plugin: PluginFiles) -> Manifest:
    """The manifest of a plugin that was read; that of one without any says nothing but its id.

    Raises:
        ManifestError: it is wrong, or names a module that is not in the plugin.
    """
    if plugin.manifest is None:
        return Manifest(plugin.id)
    manifest = parse(plugin.id, *plugin.manifest)
    if manifest.module is not None and module_file(plugin, manifest.module) is None:
        source = _Source(*plugin.manifest)
        path = manifest.module.replace(".", "/")
        value = f"{manifest.module}:{manifest.functions[0]}"
        source.refuse(("entry_point",), f"entry_point is {value!r}: there is no {path}.py or {path}/__init__.py in the plugin")
    return manifest


def module_file(plugin: PluginFiles, module: str | None) -> str | None:
    """The file of a plugin that the dotted name of a module means, None for none; the main file for None."""
    if module is None:
        return plugin.main
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in plugin.files), None)


def parse(plugin_id: str, name: str, data: bytes) -> Manifest:
    """Parse the manifest with this file name and content.

    Raises:
        ManifestError: one sentence with the file, the line where there is one, what is wrong, and the mend.
    """
    source = _Source(name, data)
    document = source.document()
    given: dict[str, Any] = {"name": plugin_id}
    for key, value in document.items():
        if key in TABLES:
            given[key] = _table(source, key, value)
        elif key in _FIELDS:
            try:
                given.update(_FIELDS[key](key, value))
            except ValueError as error:
                source.refuse((key,), f"{key} is {config.show(value)}: {error}")
        else:
            source.refuse((key,), _unknown(key, value))
    return Manifest(**given)


class _Source:
    """The text of a manifest, and where in it what stands."""

    def __init__(self, name: str, data: bytes) -> None:
        self.path = name
        self.shown = escape_text(name, keep="")
        try:
            self.text = config.decoded(self.shown, data)
        except config.ConfigError as error:
            raise ManifestError(str(error), path=name) from None
        self.is_json = name.endswith(".json")
        nul = self.text.find("\0")
        if nul >= 0:
            self.refuse_line(self.text.count("\n", 0, nul) + 1, "there is a NUL character: save it as UTF-8 text")

    def document(self) -> dict[str, Any]:
        return self.parsed_json() if self.is_json else self.parsed_toml()

    def parsed_toml(self) -> dict[str, Any]:
        for counted, line in enumerate(self.text.split("\n"), 1):
            if line.count(".") > MOST_DOTS:
                self.refuse_line(counted, f"there are more than {MOST_DOTS} dots: break the line, or write it with less")
        try:
            return config.parse_toml(self.shown, self.text)
        except config.ConfigError as error:
            reason = str(error).removeprefix(f"{self.shown} is not valid TOML: ")
        what, at, place = reason.removesuffix(")").rpartition(" (at ")
        if not at:  # no error of syntax: too deep, or too many digits for Python
            self.refuse((), f"this is not valid TOML: {reason.partition(':')[0]}")
        number = place.removeprefix("line ").partition(",")[0]
        last = self.text.rstrip().count("\n") + 1
        return self.refuse_line(int(number) if number.isdecimal() else last, f"this is not valid TOML: {what}")

    def parsed_json(self) -> dict[str, Any]:
        repeated: list[str] = []

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in pairs:
                if key in found:
                    repeated.append(key)
                found[key] = value
            return found

        try:
            document = json.loads(self.text, object_pairs_hook=once)
        except json.JSONDecodeError as error:
            self.refuse_line(error.lineno, f"this is not valid JSON: {error.msg} (column {error.colno})")
        except RecursionError:
            self.refuse((), "this is not valid JSON: nested too deeply")
        except ValueError:  # Python's bound on the digits of an int
            self.refuse((), "there is a number of too many digits: give one that makes sense")
        if repeated:
            seen: set[lines.Path] = set()
            for path, line in self.keys():
                if len(path) > DEPTH:
                    self.refuse_line(line, "this is nested too deeply for a manifest")
                if path in seen:
                    self.refuse_line(line, f"{config.plain_key(path[-1])} is there for a second time: remove one of them")
                seen.add(path)
            self.refuse((), f"{config.plain_key(repeated[0])} is there for a second time: remove one of them")
        if not isinstance(document, dict):
            self.refuse_line(1, 'this is no JSON object: begin with "{"')
        return document

    def keys(self) -> Iterator[tuple[lines.Path, int]]:
        return lines.json_keys(self.text) if self.is_json else lines.toml_keys(self.text)

    def line(self, path: lines.Path) -> int | None:
        """The line of the key, or of the table around it; None for the whole file."""
        if not path:
            return None
        found = {each: line for each, line in self.keys() if each == path[: len(each)]}
        return found[max(found, key=len)] if found else None

    def where(self, path: lines.Path) -> str:
        line = self.line(path)
        return self.shown if line is None else f"{self.shown}, line {line}"

    def refuse(self, path: lines.Path, sentence: str) -> NoReturn:
        raise ManifestError(f"{self.where(path)}: {sentence}", path=self.path, line=self.line(path))

    def refuse_line(self, line: int, sentence: str) -> NoReturn:
        raise ManifestError(f"{self.shown}, line {line}: {sentence}", path=self.path, line=line)


def _table(source: _Source, table: str, value: object) -> dict[str, Any]:
    """The fields of one table, each checked, and all of them together."""
    if not isinstance(value, dict):
        source.refuse((table,), f"{table} is {config.show(value)}: make it a table, [{table}]")
    asked: dict[str, Any] = {}
    for key, item in value.items():
        try:
            asked |= config.read_table("", table, {table: {key: item}})
        except config.ConfigError as error:
            source.refuse((table, key), str(error).removeprefix(": "))
    try:
        TABLES[table](**asked)
    except (TypeError, ValueError) as error:  # a threshold above its limit
        field_name = str(error).partition(" is ")[0].rpartition(".")[2]
        source.refuse((table, field_name), f"[{table}] {str(error).partition('.')[2]}")
    return asked


def _unknown(key: str, value: object) -> str:
    what = f"unknown table [{config.plain_key(key)}]" if isinstance(value, dict) else f"unknown key {config.plain_key(key)}"
    for table, checks in config.TABLES.items():
        if key in checks:
            return f"{what}: put it into [{table}]"
    return f"{what}: {config.known(key, [*_FIELDS, *TABLES])}"


# Fields outside of a table: each returns what it says of the Manifest, or raises ValueError with the mend.


def _line_of_text(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > NAME_CHARACTERS:
        raise ValueError(f"give a text of one line, at most {NAME_CHARACTERS} printable characters")
    return {key: value}


def _description(key: str, value: object) -> dict[str, Any]:
    is_text = isinstance(value, str) and len(value) <= DESCRIPTION_CHARACTERS and "\0" not in value
    if not is_text or str(value).encode(errors="ignore").decode() != value:  # JSON can write half of a surrogate pair
        raise ValueError(f"give a text of at most {DESCRIPTION_CHARACTERS:,} characters, without NUL")
    return {key: value}


def _entry_point(key: str, value: object) -> dict[str, Any]:
    module, colon, function = value.rpartition(":") if isinstance(value, str) else ("", ":", "")
    if not _is_name(function) or (colon and not all(map(_is_name, module.split(".")))):
        raise ValueError('give "function", or "module:function" for one of another file of the plugin')
    return {"module": module or None, "functions": (function,)}


def _is_name(text: str) -> bool:
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def _sha256(key: str, value: object) -> dict[str, Any]:
    mend = 'give a table of files and their digests, { "main.py" = "<64 hexadecimal digits>" }, with every file of the plugin'
    if not isinstance(value, dict) or not value:
        raise ValueError(mend)
    for text in value.values():
        if not isinstance(text, str) or len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
            raise ValueError(mend)
    return {key: {path: text.lower() for path, text in value.items()}}


def _recovery(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != {"max_memory_mb"}:
        raise ValueError(f"make it a table, [{key}], with max_memory_mb alone")
    try:
        limits = config.PluginLimitsV2(max_memory_mb=value["max_memory_mb"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"max_memory_mb {str(error).partition('max_memory_mb ')[2]}") from None
    return {"retry_memory_mb": limits.max_memory_mb}


_FIELDS: dict[str, Callable[[str, object], dict[str, Any]]] = {
    "name": _line_of_text,
    "version": _line_of_text,
    "description": _description,
    "entry_point": _entry_point,
    "sha256": _sha256,
    "recovery": _recovery,
}

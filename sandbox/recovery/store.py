"""What psie remembers between runs: how they went, which plugins are quarantined, where the audit ends. One SQLite file.

Host side, and never on the start path of a run: runs come by the spool (sandbox.recovery.spool), and are moved from there when
somebody asks for them. Must not know who decides on a quarantine, or how a run is made.

Who writes holds an flock on `psie.lock`; in WAL mode SQLite has one writer anyway, and so a damaged file is set aside while
nobody writes. A file that was set aside, removed or migrated by another process is noticed before each use: rows are then
written to the file that is there, or not at all. Sources: sqlite.org's wal.html, howtocorrupt.html and pragma.html.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import sqlite3
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Self, TypeVar
from urllib.parse import quote

from sandbox.errors import ResourceError
from sandbox.recovery import in_force, private, spool
from sandbox.text import escape_text
from sandbox.violations import to_plain

T = TypeVar("T")

NAME = "psie.db"
LOCK = "psie.lock"
BESIDE = ("-wal", "-shm", "-journal")  # files that SQLite keeps beside it, the last only while a new one is made
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

OUTCOMES = ("ok", "error", "limit", "violation", "refused")
DOORS = ("command", "library", "framework")

MAX_AGE_DAYS = 90.0
MAX_ROWS = 100_000
TRIM_EVERY = 1000  # rows
VIOLATION_BYTES = spool.VIOLATION_BYTES  # of JSON
TEXT = spool.TEXT  # characters of a reason

# One step for each version of the schema. A step that was released is never changed: add another.
MIGRATIONS: list[tuple[str, ...]] = [
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY AUTOINCREMENT, started REAL NOT NULL, plugin_id TEXT NOT NULL, sha256 TEXT NOT NULL,
            level TEXT NOT NULL, limits TEXT NOT NULL, seconds REAL NOT NULL, peak_memory_mb REAL NOT NULL,
            peak_cpu_percent REAL NOT NULL, exit_code INTEGER, outcome TEXT NOT NULL, reason TEXT NOT NULL,
            violations TEXT NOT NULL, violation_types TEXT NOT NULL, sandbox_id TEXT NOT NULL, door TEXT NOT NULL,
            version TEXT NOT NULL)""",
        "CREATE INDEX runs_by_time ON runs (started, id)",
        "CREATE INDEX runs_by_plugin ON runs (plugin_id, started, id)",
        "CREATE INDEX runs_by_level ON runs (level, started, id)",
        "CREATE INDEX runs_by_outcome ON runs (outcome, started, id)",
        """CREATE TABLE quarantine (
            id INTEGER PRIMARY KEY AUTOINCREMENT, plugin_id TEXT NOT NULL, sha256 TEXT, reason TEXT NOT NULL,
            violations TEXT NOT NULL, since REAL NOT NULL, "by" TEXT NOT NULL, evidence TEXT, released REAL,
            released_by TEXT)""",
        "CREATE INDEX quarantine_by_plugin ON quarantine (plugin_id) WHERE released IS NULL",
        "CREATE INDEX quarantine_by_sha256 ON quarantine (sha256) WHERE released IS NULL",
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
    ("ALTER TABLE runs ADD COLUMN run_id TEXT", "CREATE UNIQUE INDEX runs_by_run_id ON runs (run_id)"),
]


@dataclass(frozen=True)
class Run:
    """One run of a plugin.

    Attributes:
        started: Unix time, in seconds.
        plugin_id: which plugin; may be the plugin's word, so escape it before showing it.
        sha256: of the plugin, in hexadecimal; "" where it is not known.
        level: "minimal", "standard", "strict" or "maximum".
        outcome: one of OUTCOMES.
        door: one of DOORS: where it came in.
        limits: the limits by name.
        seconds: how long it took.
        peak_memory_mb: megabytes of 2**20 bytes.
        peak_cpu_percent: of one CPU.
        exit_code: None where there is none.
        reason: why it ended, in words.
        violations: the records, as SandboxViolation.to_dict gives them. The first 64 KiB of them are kept.
        sandbox_id: which sandbox.
        version: of psie.
        id: the store's number, growing; None before it is stored.
        run_id: of this run alone, also in the audit; a row is stored once. "" in rows of old.

    Raises:
        ValueError: an outcome or door that there is not, or a number that is not finite.
    """

    started: float
    plugin_id: str
    sha256: str
    level: str
    outcome: str
    door: str
    limits: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    peak_cpu_percent: float = 0.0
    exit_code: int | None = None
    reason: str = ""
    violations: Sequence[Mapping[str, Any]] = ()
    sandbox_id: str = ""
    version: str = ""
    id: int | None = None
    run_id: str = field(default_factory=lambda: os.urandom(8).hex())

    def __post_init__(self) -> None:
        for name, known in (("outcome", OUTCOMES), ("door", DOORS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Run.{name} is {getattr(self, name)!r}: give one of {', '.join(known)}")
        for name in ("started", "seconds", "peak_memory_mb", "peak_cpu_percent"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"Run.{name} is {getattr(self, name)!r}: give a finite number")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data that `json.dumps` takes."""
        return {item.name: to_plain(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True)
class Quarantined:
    """One quarantine of a plugin.

    Attributes:
        id: the store's number.
        plugin_id: which plugin; escape it before showing it.
        sha256: of the plugin, in hexadecimal; None where it was not known: then the quarantine is of the name alone.
        reason: why, in words; escape it likewise.
        violations: the records that led to it.
        since: Unix time, in seconds.
        by: who decided it.
        evidence: path of the evidence folder, if there is one.
        released: Unix time; None while it holds.
        released_by: who released it.
    """

    id: int
    plugin_id: str
    sha256: str | None
    reason: str
    violations: Sequence[Mapping[str, Any]]
    since: float
    by: str
    evidence: str | None = None
    released: float | None = None
    released_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data that `json.dumps` takes."""
        return {item.name: to_plain(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True)
class Percentiles:
    """The smallest values that 50, 95 and 99 % of all do not exceed (nearest rank)."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> Percentiles:
        """Of at least one value."""
        ranked = sorted(values)
        return cls(*(ranked[math.ceil(len(ranked) * percent / 100) - 1] for percent in (50, 95, 99)))


@dataclass(frozen=True)
class Statistics:
    """The runs of one plugin.

    Attributes:
        runs: how many.
        outcomes: how many of each outcome that there was.
        violations: how many of each type that there was.
        seconds: of the time they took.
        peak_memory_mb: of the most memory they had.
    """

    runs: int
    outcomes: Mapping[str, int]
    violations: Mapping[str, int]
    seconds: Percentiles
    peak_memory_mb: Percentiles


class Store:
    """The records in one folder. For any number of processes and threads; also a fork may go on using it.

    Every method raises ResourceError if the file belongs to somebody else, was made by a newer psie, cannot be written, or is
    locked for more than 10 s; then nothing was stored. A damaged file is set aside and told of by `on_trouble`, a function of
    one sentence; work goes on with a new one, in which the quarantines are in force that were.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, on_trouble: Callable[[str], None] | None = None
    ) -> None:
        """In psie's own folder, or in `folder`. `on_trouble`: by default a warning of the logger "psie"."""
        self.folder = os.path.abspath(os.fspath(folder)) if folder is not None else private.default_folder()
        self.path = os.path.join(self.folder, NAME)
        self.on_trouble = on_trouble or logging.getLogger("psie").warning
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None  # of the file that is open: device, inode
        _stores.add(self)
        self._do(lambda connection: None, write=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. A later use opens it again."""
        with self._lock:
            self._close()

    # -- runs ------------------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Move the runs that wait in the spool into rows, each once, and tell the audit. What is damaged is told of."""
        damaged = spool.take(self.folder, self._move)
        if damaged:
            path = os.path.join(self.folder, spool.NAME)
            self.on_trouble(escape_text(f"{path} was damaged: {damaged} bytes of it were no record of a run", keep=""))

    def _move(self, records: list[dict[str, Any]]) -> None:
        from sandbox.recovery.audit import AuditLog  # which knows the store

        runs, rows = [], []
        for record in records:
            types = record.pop("violation_types", {})
            try:
                run = Run(**record)
                rows.append(_run_row(run, types))
                runs.append(run)
            except (ValueError, TypeError, AttributeError) as error:  # of another psie than this
                self.on_trouble(escape_text(f"a run is left out, whose record is none: {error}", keep=""))
        if not runs:
            return
        self._add(rows, durable=True)
        AuditLog(self).append_all([("run", _told(run)) for run in runs])

    def add_runs(self, runs: Sequence[Run]) -> None:
        """Store all of `runs`, or none; one that is stored already stays as it is. Nothing is told to the audit.

        Whoever has run something records it by sandbox.recovery.spool.append.
        """
        self._add([_run_row(run) for run in runs], durable=False)

    def _add(self, rows: Sequence[tuple[Any, ...]], *, durable: bool) -> None:
        """About every 1000 rows old ones are removed, as `trim` does."""

        def work(connection: sqlite3.Connection) -> bool:
            connection.executemany(_INSERT_RUN, rows)
            (last,) = connection.execute("SELECT max(id) FROM runs").fetchone()
            is_due = bool(rows) and last % TRIM_EVERY < len(rows)
            if is_due:
                _trim(connection, MAX_AGE_DAYS, MAX_ROWS)
            return is_due

        if self._do(work, write=True, durable=durable):
            self._trim_evidence()

    def runs(
        self,
        plugin: str | None = None,
        level: str | None = None,
        outcome: str | None = None,
        since: float | None = None,
        limit: int = 100,
    ) -> list[Run]:
        """The runs that all given arguments fit, newest first. `since` is Unix time. Raises ValueError for a limit below 0."""
        if limit < 0:
            raise ValueError(f"runs: limit is {limit}: give how many runs at most")
        self._collect_waiting()
        given = {
            "plugin_id = ?": _text_or_none(plugin),
            "level = ?": _text_or_none(level),
            "outcome = ?": _text_or_none(outcome),
            "started >= ?": since,
        }
        conditions = {condition: value for condition, value in given.items() if value is not None}
        where = "WHERE " + " AND ".join(conditions) if conditions else ""
        query = f"SELECT {_RUN_COLUMNS} FROM runs {where} ORDER BY started DESC, id DESC LIMIT ?"
        rows = self._do(lambda connection: connection.execute(query, (*conditions.values(), limit)).fetchall(), write=False)
        return [_run(row) for row in rows]

    def trim(self, max_age_days: float = MAX_AGE_DAYS, max_rows: int = MAX_ROWS) -> tuple[int, int]:
        """Remove runs that are older, and of the others the oldest beyond `max_rows`; and old evidence, see `evidence.trim`.

        Returns how many runs and how many folders of evidence.
        """
        self._collect_waiting()
        count = self._do(lambda connection: _trim(connection, max_age_days, max_rows), write=True)
        return count, self._trim_evidence()

    def _collect_waiting(self) -> None:
        if spool.waits(self.folder):
            self.collect()

    def _trim_evidence(self) -> int:
        from sandbox.recovery import evidence

        keep = [each.evidence for each in self.quarantined() if each.evidence]
        return evidence.trim(os.path.join(self.folder, evidence.FOLDER), keep)

    def statistics(self, since: float | None = None) -> dict[str, Statistics]:
        """The stored runs since then (Unix time), by plugin."""
        query = "SELECT plugin_id, outcome, seconds, peak_memory_mb, violation_types FROM runs WHERE started >= ?"
        start = -math.inf if since is None else since
        self._collect_waiting()
        groups: dict[str, list[tuple[str, float, float, str]]] = {}
        for plugin, *values in self._do(lambda connection: connection.execute(query, (start,)).fetchall(), write=False):
            groups.setdefault(plugin, []).append(tuple(values))
        return {plugin: _statistics(rows) for plugin, rows in sorted(groups.items())}

    # -- quarantine ------------------------------------------------------------------------------------------------------

    def quarantine(
        self,
        plugin_id: str,
        sha256: str | None,
        reason: str,
        violations: Sequence[Mapping[str, Any]],
        by: str,
        evidence: str | os.PathLike[str] | None = None,
    ) -> Quarantined:
        """Quarantine the plugin: its name, and if `sha256` is given also the same content under another name.

        On disk when this returns. Raises ValueError without a `plugin_id`.
        """
        if not plugin_id:
            raise ValueError("quarantine: plugin_id is empty: give the name of the plugin")
        since = time.time()
        row = (
            *(_text(plugin_id), _digest(sha256), _text(reason)[:TEXT], _violations(violations), since, _text(by)),
            None if evidence is None else _text(os.fspath(evidence)),
        )

        def work(connection: sqlite3.Connection) -> tuple[Any, ...]:
            connection.execute(_INSERT_QUARANTINE, row)
            self._write_in_force(connection)
            found: tuple[Any, ...] = connection.execute(f"{_SELECT_QUARANTINE} WHERE {_SAME}", (row[0], since)).fetchone()
            return found

        return _quarantined(self._do(work, write=True, durable=True))

    def is_quarantined(self, plugin_id: str | None = None, sha256: str | None = None) -> Quarantined | None:
        """The newest quarantine in force of this name or of this content. Raises ValueError if neither is given."""
        if not plugin_id and not sha256:
            raise ValueError("is_quarantined: nothing to look for: give plugin_id, sha256 or both")
        query = f"{_SELECT_QUARANTINE} WHERE released IS NULL AND (plugin_id = ? OR sha256 = ?) ORDER BY id DESC LIMIT 1"
        values = (_text_or_none(plugin_id), _digest(sha256))
        row = self._do(lambda connection: connection.execute(query, values).fetchone(), write=False)
        return None if row is None else _quarantined(row)

    def quarantined(self, include_released: bool = False) -> list[Quarantined]:
        """The quarantines in force, or all that there ever were; newest first."""
        query = f"{_SELECT_QUARANTINE} {'' if include_released else 'WHERE released IS NULL'} ORDER BY id DESC"
        return [_quarantined(row) for row in self._do(lambda connection: connection.execute(query).fetchall(), write=False)]

    def release(self, plugin_id: str, by: str) -> int:
        """End all quarantines of this name; returns how many. On disk when this returns. Raises ValueError if there is none."""
        query = "UPDATE quarantine SET released = ?, released_by = ? WHERE released IS NULL AND plugin_id = ?"
        values = (time.time(), _text(by), _text(plugin_id))
        count = self._do(
            lambda connection: connection.execute(query, values).rowcount,
            write=True,
            durable=True,
            afterwards=self._write_in_force,
        )
        if not count:
            shown = escape_text(plugin_id, keep="")
            raise ValueError(f"release: {shown!r} is not quarantined: psie quarantine list shows which plugins are")
        return count

    # -- the end of the audit --------------------------------------------------------------------------------------------

    def audit_end(self) -> tuple[int, str] | None:
        """The number and hash of the last line of the audit that was told of; None if none was."""
        return self._do(_audit_end, write=False)

    def set_audit_end(self, seq: int, digest: str) -> None:
        """Tell of a line of the audit; one that comes before what is known changes nothing."""

        def work(connection: sqlite3.Connection) -> None:
            known = _audit_end(connection)
            if known is None or known[0] < seq:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('audit', ?)", (f"{seq} {digest}",))

        self._do(work, write=True)

    # -- the file --------------------------------------------------------------------------------------------------------

    def _do(
        self,
        work: Callable[[sqlite3.Connection], T],
        *,
        write: bool,
        durable: bool = False,
        afterwards: Callable[[sqlite3.Connection], None] | None = None,
    ) -> T:
        """`work` in a transaction; once more with a new file if this one proves damaged. `durable`: on disk afterwards.

        `afterwards` is called when it is committed, before anybody else writes.
        """
        told: list[str] = []
        try:
            with self._lock:
                try:
                    return self._transact(work, write, durable, afterwards)
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    told += self._set_aside(str(error))
                return self._transact(work, write, durable, afterwards)
        except sqlite3.Error as error:
            mend = "see to the disk, or set XDG_STATE_HOME to another folder"
            raise ResourceError(f"{self.path} cannot be used ({error}): {mend}") from None
        except OSError as error:
            raise ResourceError(f"{self.path} cannot be used ({error.strerror}): see to the disk and its rights") from None
        finally:
            for text in told:  # without the lock: who is told may use the store
                self.on_trouble(escape_text(text, keep=""))

    def _transact(
        self,
        work: Callable[[sqlite3.Connection], T],
        write: bool,
        durable: bool,
        afterwards: Callable[[sqlite3.Connection], None] | None,
    ) -> T:
        if not write:
            return self._within(self._current(), "BEGIN", work)
        with self._exclusive():
            connection = self._current(is_locked=True)
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            result = self._within(connection, "BEGIN IMMEDIATE", work)
            if afterwards is not None:
                afterwards(connection)
            return result

    def _within(self, connection: sqlite3.Connection, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        connection.execute(begin)
        try:
            self._refuse_newer(_version(connection))
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        return result

    def _refuse_newer(self, version: int) -> None:
        if version > len(MIGRATIONS):
            raise ResourceError(
                f"{NAME} in {self.folder} has schema version {version}, this psie knows {len(MIGRATIONS)}: "
                "upgrade psie, or set XDG_STATE_HOME to another folder"
            )

    def _current(self, is_locked: bool = False) -> sqlite3.Connection:
        """The connection to the file that is there now."""
        if self._connection is not None and self._identity == self._found():
            return self._connection
        if not is_locked:
            with self._exclusive():
                return self._current(is_locked=True)
        self._close(is_locked=True)
        try:
            return self._open()
        except BaseException as error:
            if not _is_damage(error):
                self._close(is_locked=True)
            raise

    def _found(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _open(self) -> sqlite3.Connection:
        """Only while nobody else opens or writes. A damaged file stays open: `_set_aside` closes it.

        Nothing but O_PATH or stat(2) may look at a file that SQLite has open: to close a descriptor drops its locks.
        """
        with private.folder(self.folder) as folder:
            with suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(NAME, flags, 0o600, dir_fd=folder))
                os.fsync(folder)  # what is durable needs its name
            for name in (NAME, *(NAME + suffix for suffix in BESIDE)):
                with suppress(FileNotFoundError):
                    private.check(os.stat(name, dir_fd=folder, follow_symlinks=False), os.path.join(self.folder, name))
        self._identity = self._found()
        connection = self._connection = sqlite3.connect(
            f"file:{quote(os.fsencode(self.path))}?mode=rw",
            uri=True,
            timeout=private.PATIENCE,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        version = _version(connection)
        self._refuse_newer(version)
        if version < len(MIGRATIONS):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                for step in MIGRATIONS[version:]:
                    for statement in step:
                        connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
        self._reconcile(connection)
        return connection

    def _reconcile(self, connection: sqlite3.Connection) -> None:
        """What is in force by the file, but never was in the database: that is new, or whoever decided it was killed."""
        known = in_force.read(self.folder)
        query = f"SELECT 1 FROM quarantine WHERE {_SAME}"
        missing = [
            each for each in known or () if connection.execute(query, (each["plugin_id"], each["since"])).fetchone() is None
        ]
        if missing:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            for each in reversed(missing):
                connection.execute(_INSERT_QUARANTINE, [{**each, "violations": "[]"}[name] for name in _QUARANTINE])
            connection.execute("COMMIT")
        if known != _in_force(connection):
            self._write_in_force(connection)

    def _write_in_force(self, connection: sqlite3.Connection) -> None:
        with private.folder(self.folder) as folder:
            in_force.write(folder, _in_force(connection))

    def _set_aside(self, error: str) -> list[str]:
        """Rename the damaged file and those beside it, unless another process has; returns what to tell.

        It is renamed before it is closed: SQLite leaves a file alone that has moved. The file itself goes last, so that
        whoever is killed in between leaves a damaged file without its log, which is set aside the next time.
        """
        with self._exclusive():
            told = []
            if self._identity is not None and self._identity == self._found():
                name = f"{NAME}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
                with private.folder(self.folder) as folder:
                    for suffix in (*BESIDE, ""):
                        with suppress(FileNotFoundError):
                            os.rename(NAME + suffix, name + suffix, src_dir_fd=folder, dst_dir_fd=folder)
                quarantines = (
                    f"which plugins were quarantined is lost, because {in_force.NAME} is damaged as well"
                    if in_force.read(self.folder) is None
                    else "the plugins that were quarantined still are"
                )
                told.append(
                    f"{self.path} was damaged ({error}), so it was set aside as {name} and a new one begun: history is empty; "
                    f"{quarantines}"
                )
            self._close(is_locked=True)
        return told

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Alone among all processes that write. Opened anew each time, so that no fork shares it."""
        path = os.path.join(self.folder, LOCK)
        with private.folder(self.folder) as folder:
            fd = private.open_file(folder, LOCK, os.O_RDWR | os.O_CREAT, path)
        try:
            with private.locked(fd, fcntl.LOCK_EX, path):
                yield
        finally:
            os.close(fd)

    def _close(self, is_locked: bool = False) -> None:
        """SQLite's last close removes the log by its name: nobody may set the file aside at that moment."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if is_locked:
            connection.close()
            return
        try:
            with self._exclusive():
                connection.close()
        except (OSError, ResourceError):  # the folder has gone: nothing is left to disturb
            connection.close()


# -- forks ---------------------------------------------------------------------------------------------------------------

# A fork would inherit SQLite's own table of locks, and believe that it has those of its parent: files must be closed before.
_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_held: list[Store] = []
_forking = threading.Lock()  # one thread at a time


def _before_fork() -> None:
    _forking.acquire()
    for store in list(_stores):
        store._lock.acquire()
        _held.append(store)
        store._close()


def _after_fork() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


# -- rows ----------------------------------------------------------------------------------------------------------------

_RUN_COLUMNS = (
    "started, plugin_id, sha256, level, outcome, door, limits, seconds, peak_memory_mb, peak_cpu_percent, exit_code, reason, "
    "violations, sandbox_id, version, id, run_id"
)
_INSERT_RUN = (
    f"INSERT INTO runs ({_RUN_COLUMNS.replace(', id,', ',')}, violation_types) VALUES ({', '.join('?' * 17)}) "
    "ON CONFLICT (run_id) DO NOTHING"
)
_SELECT_QUARANTINE = (
    'SELECT id, plugin_id, sha256, reason, violations, since, "by", evidence, released, released_by FROM quarantine'
)
_QUARANTINE = ("plugin_id", "sha256", "reason", "violations", "since", "by", "evidence")
_SAME = "plugin_id = ? AND since = ?"  # there is one of a name at a time
_INSERT_QUARANTINE = (
    'INSERT INTO quarantine (plugin_id, sha256, reason, violations, since, "by", evidence) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 '
    "WHERE NOT EXISTS (SELECT 1 FROM quarantine WHERE plugin_id = ?1 AND since = ?5)"
)


def _run_row(run: Run, types: Mapping[str, int] | None = None) -> tuple[Any, ...]:
    """`types`: how many violations there were of each, where not all of them were kept."""
    if types is None:
        types = Counter(str(violation.get("type", "")) for violation in run.violations)
    return (
        *(run.started, _text(run.plugin_id), _digest(run.sha256) or "", _text(run.level), run.outcome, run.door),
        json.dumps(to_plain(dict(run.limits))),
        *(run.seconds, run.peak_memory_mb, run.peak_cpu_percent, run.exit_code, _text(run.reason)[:TEXT]),
        *(_violations(run.violations), _text(run.sandbox_id), _text(run.version), _text(run.run_id), json.dumps(types)),
    )


def _run(row: Sequence[Any]) -> Run:
    values = dict(zip((item.name for item in fields(Run)), row, strict=True))
    loaded = {"limits": _loaded(values["limits"], {}), "violations": _loaded(values["violations"], [])}
    return Run(**{**values, **loaded, "run_id": values["run_id"] or ""})


def _told(run: Run) -> dict[str, object]:
    """What the audit is told of a run."""
    names = ("run_id", "started", "plugin_id", "sha256", "level", "outcome", "reason", "sandbox_id", "door")
    return {name: getattr(run, name) for name in names}


def _quarantined(row: Sequence[Any]) -> Quarantined:
    values = dict(zip((item.name for item in fields(Quarantined)), row, strict=True))
    return Quarantined(**{**values, "violations": _loaded(values["violations"], [])})


def _in_force(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """What the file of those in force is to say, newest first. Their violations are evidence, and too much for a start."""
    rows = connection.execute(f"{_SELECT_QUARANTINE} WHERE released IS NULL ORDER BY id DESC").fetchall()
    return [{name: getattr(_quarantined(row), name) for name in in_force.FIELDS} for row in rows]


def _trim(connection: sqlite3.Connection, max_age_days: float, max_rows: int) -> int:
    old = connection.execute("DELETE FROM runs WHERE started < ?", (time.time() - max_age_days * 86400,)).rowcount
    beyond = "SELECT id FROM runs ORDER BY started DESC, id DESC LIMIT -1 OFFSET ?"
    return old + connection.execute(f"DELETE FROM runs WHERE id IN ({beyond})", (max_rows,)).rowcount


def _statistics(rows: Sequence[tuple[str, float, float, str]]) -> Statistics:
    violations: Counter[str] = Counter()
    for types, count in Counter(row[3] for row in rows).items():
        for kind, number in _loaded(types, {}).items():
            violations[kind] += number * count
    return Statistics(
        len(rows),
        dict(Counter(row[0] for row in rows)),
        dict(violations),
        Percentiles.of([row[1] for row in rows]),
        Percentiles.of([row[2] for row in rows]),
    )


def _violations(violations: Sequence[Mapping[str, Any]]) -> str:
    """As many of them as there is room for, as JSON."""
    kept: list[str] = []
    left = VIOLATION_BYTES
    for violation in violations:
        text = json.dumps(to_plain(dict(violation)))
        left -= len(text)
        if left < 0:
            break
        kept.append(text)
    return f"[{', '.join(kept)}]"


def _audit_end(connection: sqlite3.Connection) -> tuple[int, str] | None:
    row = connection.execute("SELECT value FROM meta WHERE key = 'audit'").fetchone()
    seq, _, digest = row[0].partition(" ") if row is not None else ("", "", "")
    return (int(seq), digest) if seq.isdecimal() else None


def _loaded(text: str, otherwise: Any) -> Any:
    """What the JSON says; `otherwise` where a damaged disk has made it none: one cell is no reason to lose the row."""
    try:
        return json.loads(text)
    except ValueError:
        return otherwise


def _text(text: str) -> str:
    """SQLite has no lone surrogates, which names of files can have."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text_or_none(text: str | None) -> str | None:
    return _text(text) if text else None


def _digest(sha256: str | None) -> str | None:
    return _text(sha256).lower() if sha256 else None


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _is_damage(error: BaseException) -> bool:
    """Extended codes have the plain one in their lowest byte."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE

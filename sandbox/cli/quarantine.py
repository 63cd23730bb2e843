"""`psie quarantine`: which plugins are quarantined and why, their release, and a copy of the evidence."""

from __future__ import annotations

import json
import os
import pwd
import shutil

from sandbox.cli import records
from sandbox.cli.inputs import UsageError
from sandbox.cli.session import say
from sandbox.errors import ResourceError
from sandbox.recovery import private
from sandbox.recovery.audit import AuditLog
from sandbox.recovery.store import Quarantined, Store


def listed(include_released: bool, as_json: bool) -> int:
    """Print the quarantines, newest first; 0 also where there are none."""

    def show(store: Store) -> int:
        found = store.quarantined(include_released)
        if as_json:
            print(json.dumps([each.to_dict() for each in found], indent=2))
        elif found:
            from sandbox.cli.table import print_table

            rows = [[records.shown_time(each.since), each.plugin_id, each.by, state(each), each.reason] for each in found]
            print_table(["since", "plugin", "by", "state", "reason"], rows)
        else:
            print("no plugin is quarantined")
        return 0

    return records.with_store(show)


def state(quarantined: Quarantined) -> str:
    if quarantined.released is None:
        return "quarantined"
    return f"released {records.shown_time(quarantined.released)} by {quarantined.released_by}"


def show(plugin_id: str, as_json: bool) -> int:
    """Print all that is known of the newest quarantine of a plugin."""

    def work(store: Store) -> int:
        found = newest(store, plugin_id)
        if as_json:
            print(json.dumps(found.to_dict(), indent=2))
            return 0
        from sandbox.cli.table import print_table

        facts = {"plugin": found.plugin_id, "state": state(found), "since": records.shown_time(found.since), "by": found.by}
        facts |= {"reason": found.reason, "sha256": found.sha256 or "not known", "evidence": found.evidence or "none"}
        rows = [*facts.items(), *(("violation", str(each.get("message", ""))) for each in found.violations)]
        print_table(["fact", "value"], rows)
        return 0

    return records.with_store(work)


def newest(store: Store, plugin_id: str) -> Quarantined:
    """The newest quarantine of this name, one in force before those released. Raises UsageError if there is none."""
    known = store.quarantined(include_released=True)
    name = records.one_of(plugin_id, [each.plugin_id for each in known])
    found = [each for each in known if each.plugin_id == name]
    if not found:
        raise UsageError(f"{plugin_id} is not quarantined and never was: psie quarantine list --all shows which plugins are")
    return min(found, key=lambda each: each.released is not None)


def release(plugin_id: str) -> int:
    """Release a plugin. 0; 1: it is not quarantined.

    The audit is told first: a release that nobody can find is worse than one that was announced and did not come.
    """

    def work(store: Store) -> int:
        known = {each.plugin_id for each in store.quarantined()}
        name = records.one_of(plugin_id, known)
        if name not in known:
            say(f"{plugin_id} is not quarantined: psie quarantine list shows which plugins are")
            return 1
        AuditLog(store).append("quarantine-release", plugin_id=name, by=person())
        try:
            count = store.release(name, person())
        except ValueError as error:  # another process was faster
            say(str(error))
            return 1
        say(f"{name}: {count} quarantine{'' if count == 1 else 's'} released")
        return 0

    return records.with_store(work)


def person() -> str:
    """Who is at work, as the host's list of users says; the environment could say anything."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"


def export(plugin_id: str, target: str) -> int:
    """Copy the evidence of the newest quarantine to the new folder `target`, with quarantine.json, which comes last."""

    def work(store: Store) -> int:
        found = newest(store, plugin_id)
        if os.path.lexists(target):
            raise UsageError(f"{target} is there already: give a folder that is not")
        if not os.path.isdir(os.path.dirname(os.path.abspath(target))):
            raise UsageError(f"{target}: the folder that it is to be in is not there: make that first")
        try:
            if found.evidence is None:
                os.mkdir(target, 0o700)
            else:
                copy(found.evidence, target)
            with open(
                os.path.join(target, "quarantine.json"), "x", opener=lambda path, flags: os.open(path, flags, 0o600)
            ) as file:
                file.write(json.dumps(found.to_dict(), indent=2) + "\n")
        except (OSError, shutil.Error) as error:
            shutil.rmtree(target, ignore_errors=True)
            raise ResourceError(f"{target} was not made: {getattr(error, 'strerror', None) or error}") from None
        if found.evidence is None:
            say("there is no evidence: the folder holds quarantine.json alone")
        return 0

    return records.with_store(work)


def copy(evidence: str, target: str) -> None:
    if not os.path.isdir(evidence):
        raise ResourceError(f"{evidence}, the evidence, is not there any more: psie quarantine show has what is known")
    with private.folder(evidence):
        shutil.copytree(evidence, target, symlinks=True)

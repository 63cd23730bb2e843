"""`psie gc`: removes what is left of sandboxes whose caller and zygote were killed together, and finishes their commits.

And what of the records is too old: runs, and evidence that no quarantine in force needs.
"""

from __future__ import annotations

import os

from sandbox.cgroups import place
from sandbox.cli.session import complain, in_words, say
from sandbox.engine import sweep
from sandbox.errors import ResourceError
from sandbox.plugins import stage
from sandbox.recovery import commit, evidence, private, spool
from sandbox.recovery.store import NAME, Store


def remove() -> int:
    kind, folder, _ = place.find()
    leaves: list[str] = []
    if kind in ("root", "delegated"):  # a scope goes with its last process
        try:
            opened = os.open(os.path.join(folder, place.FOLDER), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        else:
            leaves = sweep.leaves(opened)
            os.close(opened)
    try:
        folders = sweep.workspaces()
        stages = stage.sweep()
        for line in commit.recover():
            print(line)
        records = private.default_folder()
        if evidence.remove_unfinished(os.path.join(records, evidence.FOLDER)):
            print("removed evidence that was not finished")
        if os.path.lexists(os.path.join(records, NAME)) or spool.waits(records):
            with Store(records, on_trouble=say) as store:
                runs, folders_of_evidence = store.trim()
            if runs or folders_of_evidence:
                print(f"removed {runs} old runs and {folders_of_evidence} folders of old evidence")
    except BrokenPipeError:
        raise
    except OSError as error:
        return complain(ResourceError(in_words(error)))
    except ResourceError as error:
        return complain(error)
    counts = f"{len(leaves)} cgroups, {len(folders)} workspace folders and {len(stages)} folders of staged plugins"
    print(f"removed {counts} of dead sandboxes")
    return 0

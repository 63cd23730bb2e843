"""Own process, session and environment; no inherited descriptor; no new privileges; not dumpable; ids; capabilities."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.selftest.attacks import (
    NAMESPACED,
    PLACE,
    SECRET,
    Scene,
    Where,
    attack,
    attempt,
    calls,
    first_escape,
    given,
    scrambled,
    syscall,
)

OWN = "own process"
PRIVILEGES = "no_new_privs, capabilities, ids"
NOBODY = 65534

question = given(secret=scrambled(SECRET))


@attack(OWN, scene=question)
def environment(secret: bytes) -> str:
    import os

    wanted = bytes(byte ^ 0x55 for byte in secret)
    leaked = [os.fsdecode(name) for name, value in os.environb.items() if wanted in value]
    try:
        with open("/proc/self/environ", "rb") as file:
            leaked += ["/proc/self/environ"] if wanted in file.read() else []
    except PermissionError:
        pass  # not dumpable
    return f"escaped: {leaked}" if leaked else "stopped: not there"


@attack(OWN, scene=question, name="environment_of_the_parents", refusals=("EIO",))
def environment_of_the_parents(secret: bytes) -> str:
    """Walk up the parents, as far as /proc shows them."""
    import os

    wanted = bytes(byte ^ 0x55 for byte in secret)
    pid, seen = os.getppid(), []
    while pid > 0:

        def look(pid: int = pid) -> None:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if wanted not in file.read():
                    raise FileNotFoundError(2, "not there")

        answer = attempt(look)
        if answer.startswith("escaped"):
            return f"escaped: the environment of {pid}"
        seen.append(answer.removeprefix("stopped: "))
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            break
    return "stopped: " + ",".join(dict.fromkeys(seen))


@attack(OWN, scene=question)
def inherited_descriptors(secret: bytes) -> str:
    """Anything but standard streams, which are pipes and /dev/null, and the one socket to the caller."""
    import os
    import stat

    wanted = bytes(byte ^ 0x55 for byte in secret)

    def holds_it(fd: int) -> bool:
        try:
            return wanted in os.pread(fd, 4096, 0)
        except OSError:  # for writing only
            return False

    sockets = 0
    for fd in range(4096):
        try:
            found = os.fstat(fd)
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode) and holds_it(fd):
            return "escaped: an open file of the caller's"
        sockets += stat.S_ISSOCK(found.st_mode)
        if fd > 2 and not stat.S_ISSOCK(found.st_mode):
            return f"escaped: descriptor {fd} of mode {found.st_mode:o}"
    return f"escaped: {sockets} sockets" if sockets > 1 else "stopped: not there"


@attack(OWN, scene=question)
def memory_of_the_caller(secret: bytes) -> str:
    """Search all memory of this process. The question is scrambled, so that it does not find itself."""
    import ctypes

    head = bytes(byte ^ 0x55 for byte in secret[:12])
    with open("/proc/self/maps") as file:
        ranges = [line.split() for line in file]
    for words in ranges:
        if words[1][0] != "r" or words[-1] in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            continue
        start, end = (int(text, 16) for text in words[0].split("-"))
        data = ctypes.string_at(start, end - start) if len(words) < 6 or not words[5].startswith("/") else b""
        at = data.find(head)
        while at >= 0:
            if bytes(byte ^ 0x55 for byte in data[at + 12 : at + len(secret)]) == secret[12:]:
                return f"escaped: in {words[-1]}"
            at = data.find(head, at + 1)
    return "stopped: not there"


@attack(OWN, scene=lambda where: given(session=os.getsid(0), group=os.getpgid(0))(where))
def session_of_the_caller(session: int, group: int) -> str:
    import os

    mine = os.getsid(0) == session or os.getpgid(0) == group
    return "escaped: in the caller's session" if mine else "stopped: own session"


@attack(OWN, scene=calls("prctl"))
def become_dumpable(numbers: dict[str, int]) -> str:
    return attempt(lambda: syscall(numbers["prctl"], 4, 1))


@attack(OWN, scene=calls("prctl"))
def outlive_the_parent(numbers: dict[str, int]) -> str:
    """Without the death signal a process without PID namespace lives on when init is killed."""
    return attempt(lambda: syscall(numbers["prctl"], 1, 0))


@attack(OWN, scene=calls("prctl"))
def is_dumpable(numbers: dict[str, int]) -> str:
    return "escaped: dumpable" if syscall(numbers["prctl"], 3) == 1 else "stopped: not dumpable"


# -- privileges ----------------------------------------------------------------------------------------------------------


@contextmanager
def setuid_program(where: Where) -> Iterator[Scene]:
    """As root a set-user-ID copy of `id` in a folder that everybody can walk; rootless one that the system has."""
    folder = Path(os.environ.get(PLACE) or where.folder)
    program = folder / f"id-{os.getpid()}"
    if os.getuid() == 0:
        shutil.copy("/usr/bin/id", program)
        os.chmod(program, 0o4755)
    try:
        yield Scene({"program": str(program) if os.getuid() == 0 else ""})
    finally:
        if os.getuid() == 0:
            program.unlink()


@attack(
    PRIVILEGES,
    scene=setuid_program,
    outside_uid=NOBODY,
    permissions={"allow_subprocess_execution": True},
    limits={"max_subprocess_count": 3},
    rootless_levels=NAMESPACED,  # MINIMAL refuses subprocesses there
)
def setuid_execution(program: str) -> str:
    """Run a program that is root's by its mode, and look at the effective id that it gets."""
    import os
    import stat
    import subprocess

    def is_setuid(path: str) -> bool:
        try:
            found = os.stat(path)
        except OSError:
            return False
        return found.st_uid in (0, 65534) and bool(found.st_mode & stat.S_ISUID)

    if program:
        try:
            text = subprocess.run([program, "-u"], capture_output=True, text=True, timeout=5).stdout.strip()
        except OSError as error:
            return "stopped: EACCES" if error.errno in (1, 2, 13) else f"broken: {error!r}"
        return "escaped: root" if text == "0" else "stopped: no new id"
    for path in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount", "/usr/bin/newgrp", "/bin/su"):
        if is_setuid(path):
            process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            with open(f"/proc/{process.pid}/status") as file:
                ids = next(line for line in file if line.startswith("Uid:")).split()
            process.kill()
            process.communicate()
            return f"escaped: {path} ran as {ids[2]}" if ids[2] != ids[1] else "stopped: no new id"
    return "stopped: no such program"


@attack(PRIVILEGES)
def capabilities() -> str:
    with open("/proc/self/status") as file:
        held = {line.split()[0]: line.split()[1] for line in file if line.startswith("Cap")}
    some = {name: value for name, value in held.items() if int(value, 16) and name != "CapBnd:"}
    return f"escaped: {some}" if some else "stopped: none held"


@attack(PRIVILEGES, refusals=("EINVAL",))  # an id that the user namespace does not map
def become_root() -> str:
    import os

    return first_escape(
        {
            "setuid": lambda: os.setresuid(0, 0, 0),
            "setgid": lambda: os.setresgid(0, 0, 0),
            "setgroups": lambda: os.setgroups([0]),
        }
    )


@attack(PRIVILEGES, refusals=("EINVAL",))
def give_a_file_to_root() -> str:
    import os

    def chown() -> None:
        with open("mine", "w"):
            os.chown("mine", 0, 0)

    return attempt(chown)


@contextmanager
def private_file(where: Where) -> Iterator[Scene]:
    file = where.folder / "private"
    for folder in (where.folder, *where.folder.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)  # only the file's own mode shall matter
    file.write_text(SECRET)
    file.chmod(0o600)
    yield Scene({"path": str(file)})


@attack(PRIVILEGES, scene=private_file, rootless_levels=NAMESPACED)
def read_a_private_file_of_the_caller(path: str) -> str:
    return attempt(lambda: open(path).read())


@attack(PRIVILEGES, NAMESPACED, scene=lambda where: given(uid=os.getuid())(where))
def id_of_the_caller(uid: int) -> str:
    """The id map must not show it, and a lack of it is what keeps files of the caller's foreign."""
    with open("/proc/self/uid_map") as file:
        rows = [[int(word) for word in line.split()] for line in file]
    shown = any(start <= uid < start + length for _, start, length in rows if (uid or length > 2))
    return f"escaped: {rows}" if shown else "stopped: not there"

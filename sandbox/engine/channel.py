"""What the processes of psie say to each other, over SOCK_SEQPACKET with file descriptors by SCM_RIGHTS.

Two forms, one per direction of trust:

* *Instructions* travel towards a sandbox (host -> zygote -> warden -> init -> worker). The receiver has to trust the
  sender anyway, so they are marshal: fast, and nothing has to be imported for it.
* *Messages* travel away from it. They are flat text, `kind, name, value, name, value ...` joined by NUL, which cannot
  execute, nest or blow up; the receiver bounds the size. Every kind and its fields are listed here:

  ============ ================== ==========================================================================
  kind         who -> whom        fields
  ============ ================== ==========================================================================
  ready        zygote -> host
  failed       any -> host        line, errno, path, text; sandbox or call, where it belongs to one
  opened       warden -> host     (with the workspace's fd, if it is a mount)
  listener     worker -> warden   (with the notification listener's fd)
  sealed       worker -> warden   probe, notes (with the worker's credentials)
  sealed       warden -> host     call, and what was read back from /proc: see warden.read_back
  ended        init -> warden     status (a wait status), maxrss_kb, utime, stime; of a link rx_bytes, rx_packets, tx_bytes,
                                  tx_packets
  ended        warden -> host     call, cause (exit, timeout, memory, killed, supervisor, failed, or the host's own word),
                                  used (bytes, where memory is the cause), the fields above, and how often the cgroup
                                  has counted what: "memory.events oom_kill", "pids.events max" and their like
  up           warden -> zygote   (its descriptors are its own now)
  free         warden -> zygote
  closed       zygote -> host     sandbox, left (what could not be removed, or nothing)
  violation    supervisor -> host call, nr, arg0 .. arg2, pid, count, offences (different ones so far that may end the call);
                                  for sockets also the next line's from operation on
  network      supervisor -> host call, pid, time, count, operation, family, kind, address, port, allowed, reason, passing,
                                  counted, excess: see sandbox.engine.sockets.Wanted
  failure      worker -> host     see sandbox.engine.failure; as a reply
  unfit        worker -> host     text, allowed, used: what cannot travel and why; as a reply
  refused      worker -> host     module, list, file, line: what the interpreter has refused; in a frame of its own. Or
                                  path, operation, errno, file, line, count: what the kernel has refused it
  ============ ================== ==========================================================================

* *Frames* carry a reply from the worker: one byte of kind, in upper case in the last frame of the reply, and at most FRAME
  bytes of data. See the REPLY_ constants. A NOTE is a frame that belongs to no reply.

What is larger lies in memory files that the host makes (memfd_create(2)), so that it is counted as the host's and cannot
change while it is read: a job in one that is sealed (F_ADD_SEALS, fcntl(2)), a value in one that the worker asks for by
REPLY_SIZE and that is sealed before the host looks into it. A session could keep those, of each of its calls: its files are
lent, a value is copied out of one, and all are emptied when the reply is there.

Both `_socket` and `marshal` are used bare: `socket` would cost every sandbox 9 ms of imports. Must not import anything
else of psie.
"""

from __future__ import annotations

import _socket
import _struct as struct  # struct.py adds nothing but a file
import errno
import fcntl
import marshal
import os

FRAME = 65536  # bytes of data per frame, and of a value that needs no memory file
MESSAGE = 65536  # bytes per message that the host accepts
SMALL = 32768  # bytes of a job that travels in one instruction
INSTRUCTION = 65536  # bytes per instruction: below the size from which malloc(3) maps pages for one
DESCRIPTORS = 1 << 20  # numbers of them that we ever have, or close
REPLY_TEXT = 1 << 19  # bytes of a reply that is no value

REPLY_VALUE = b"v"  # a piece of an encoded value
REPLY_ERROR = b"e"  # a piece of an encoded exception
REPLY_UNFIT = b"u"  # a piece of a flat message "unfit": text, allowed, used; the value cannot travel
REPLY_SIZE = b"s"  # SIZE: a value of so many bytes is to come, and needs memory; its last frame says where it begins there
SIZE = struct.Struct("=Q")
ALIGNMENT = 64  # bytes: a value begins below that, so that the data of an array in it can lie as its processor wants it

# Of marshal: without its later versions' marks for strings that are to be interned. Who does that writes to the page of each
# that the interpreter has already, and copies it.
PLAIN = 2

NOTE = b"n"  # a flat message "refused", "asked" or "wanted"
FILE_OPERATIONS = (  # that a note may tell of
    *("access", "chdir", "chmod", "chown", "link", "listdir", "mkdir", "open", "rename", "rmdir", "setxattr", "symlink"),
    *("truncate", "unlink", "utime"),
)
WISHES = ("read", "list", "look", "write", "make", "delete", "program", "named")  # that a note "wanted" may tell of

SO_PASSCRED = 16
TRUNCATED = _socket.MSG_TRUNC | _socket.MSG_CTRUNC
JOB_SPACE = _socket.CMSG_SPACE(4) + _socket.CMSG_SPACE(12)  # bytes for one descriptor and the sender's credentials
SCM_RIGHTS = 1
SCM_CREDENTIALS = 2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import CodeType
    from typing import Any, TypeVar

    T = TypeVar("T")


class Malformed(ValueError):
    """Bytes that are no message of psie's."""


def pair(*, blocking: bool = True) -> tuple[_socket.socket, _socket.socket]:
    """A connected pair whose fds lie above the standard ones, also where the caller has closed those."""
    ends = []
    for end in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET):
        high = from_fd(fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)) if end.fileno() < 3 else end
        if high is not end:
            end.close()
        os.set_inheritable(high.fileno(), False)
        high.setblocking(blocking)
        ends.append(high)
    return ends[0], ends[1]


def from_fd(fd: int | None = None) -> _socket.socket:
    """A socket of our kind at `fd`; a new one, that leads nowhere yet, without."""
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)


def pack(kind: str, fields: Mapping[str, object]) -> bytes:
    parts = [kind]
    for name, value in fields.items():
        parts += name, str(value)
    text = "\0".join(parts)
    if text.count("\0") != 2 * len(fields):  # one is in a value
        text = "\0".join(part.replace("\0", "\\0") for part in parts)
    return text.encode("utf-8", "backslashreplace")


def unpack(data: bytes) -> tuple[str, dict[str, str]]:
    """(kind, fields) of a message; raises Malformed."""
    try:
        kind, *rest = data.decode("utf-8").split("\0")
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None
    if len(rest) % 2:
        raise Malformed("a field without a value")
    return kind, dict(zip(rest[::2], rest[1::2], strict=True))


def send_bytes(sock: _socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    ancillary = []
    if fds:
        ancillary.append((_socket.SOL_SOCKET, SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds)))
    try:
        sock.sendmsg([data], ancillary)
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
        send_beside_many(sock, data, ancillary)


def send_beside_many(sock: _socket.socket, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
    """Without root a plugin has its caller's id, and more descriptors under way than the soft RLIMIT_NOFILE of the caller, if
    its own is higher: unix(7), ETOOMANYREFS. The hard one still lets us send, and is ours for that moment only, because who
    uses select(2) may rely on the other."""
    import resource  # hardly ever wanted

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        sock.sendmsg([data], ancillary)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def patiently(receive: Callable[[], T]) -> T:
    """Call `receive` again if the first answer is ECONNRESET.

    An end that closes with messages unread leaves that error, and the kernel hands it out before what that end has said.
    """
    try:
        return receive()
    except ConnectionResetError:
        return receive()


def receive_frame(sock: _socket.socket) -> bytes:
    """One frame of a reply; b"" when the other end is closed."""
    return patiently(lambda: sock.recv(FRAME + 1))


def receive_bytes(sock: _socket.socket, limit: int, max_fds: int = 0) -> tuple[bytes, list[int], int]:
    """(data, fds, pid of the sender or 0); data is b"" when the other end is closed. Raises Malformed."""
    space = _socket.CMSG_SPACE(4 * max_fds) + _socket.CMSG_SPACE(12)
    data, ancillary, flags, _ = patiently(lambda: sock.recvmsg(limit, space, _socket.MSG_CMSG_CLOEXEC))
    return data, *accompanying(ancillary, flags, max_fds)


def accompanying(ancillary: list[tuple[int, int, bytes]], flags: int, max_fds: int) -> tuple[list[int], int]:
    """(fds, pid of the sender or 0) that came with a message. Raises Malformed."""
    fds: list[int] = []
    pid = 0
    for level, kind, payload in ancillary:
        if level == _socket.SOL_SOCKET and kind == SCM_RIGHTS:
            fds += [int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload) - len(payload) % 4, 4)]
        elif level == _socket.SOL_SOCKET and kind == SCM_CREDENTIALS:
            pid = int.from_bytes(payload[:4], "little")
    if flags & TRUNCATED or len(fds) > max_fds:
        for fd in fds:
            os.close(fd)
        raise Malformed("a message that is too large")
    return fds, pid


def send(sock: _socket.socket, kind: str, fields: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    send_bytes(sock, pack(kind, fields), fds)


def instruct(sock: _socket.socket, instruction: dict[str, object], fds: Sequence[int] = ()) -> None:
    send_bytes(sock, marshal.dumps(instruction), fds)


def reduce_code(code: CodeType) -> tuple[Callable[[bytes], object], tuple[bytes]]:
    """How the code of a function is pickled: as one value, and with the name of its file, which cloudpickle leaves out from
    3.1.3 on, but a traceback shows the lines of that file. Both ends have the same interpreter."""
    return marshal.loads, (marshal.dumps(code),)


def job(instruction: dict[str, object], payload: bytes) -> bytes:
    """The message of a job; of one that is larger than SMALL it says what lies in a memory file: see `large_job`."""
    return marshal.dumps((instruction, payload), PLAIN)


def large_job(header: int, size: int) -> bytes:
    """The message beside a memory file of `size` bytes: the marshalled instruction, `header` bytes, and the payload."""
    return marshal.dumps((header, size), PLAIN)


def receive_job(sock: _socket.socket) -> tuple[dict[str, Any], bytes | bytearray] | None:
    """(instruction, payload); None when there will be none. Its usual way is short: each function that a worker calls for the
    first time writes to pages that it has to copy then."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(INSTRUCTION, JOB_SPACE, _socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        data, ancillary, flags, _ = sock.recvmsg(INSTRUCTION, JOB_SPACE, _socket.MSG_CMSG_CLOEXEC)  # see `patiently`
    if not data:
        return None
    return read_job(data, accompanying(ancillary, flags, 1)[0] if ancillary or flags & TRUNCATED else ())


def read_job(data: bytes, memory: Sequence[int] = ()) -> tuple[dict[str, Any], bytes | bytearray]:
    job: Any = marshal.loads(data)
    if not memory:
        instruction, payload = job
        return instruction, payload
    header, size = job
    content = bytearray(size)
    for fd in memory:
        view, read = memoryview(content), 0
        while read < len(view):
            read += os.preadv(fd, [view[read:]], read)
        view.release()
        os.close(fd)
    with memoryview(content) as view:
        instruction = marshal.loads(view[:header])
    del content[:header]
    return instruction, content


def receive_instruction(sock: _socket.socket, max_fds: int = 16) -> tuple[dict[str, object] | None, list[int]]:
    """(instruction, fds); None when the sender has gone."""
    data, fds, _ = receive_bytes(sock, INSTRUCTION, max_fds)
    return (marshal.loads(data) if data else None), fds


def hung_up(sock: _socket.socket) -> bool:
    """Whether the other end is closed; nothing is taken from the socket."""
    try:
        return not sock.recv(1, _socket.MSG_DONTWAIT | _socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def in_memory(value: dict[str, Any]) -> int:
    """An fd of a memory file with the marshalled value, which may be larger than a message: memfd_create(2)."""
    fd = os.memfd_create("psie", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(marshal.dumps(value))
    return fd


def sealed(parts: Sequence[bytes]) -> int:
    """An fd of a memory file with `parts`, which nobody can change any more."""
    fd = os.memfd_create("psie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write(fd, parts)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write(fd: int, parts: Sequence[bytes]) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(fd, view) :]


def shared(size: int, *, lent: bool = False) -> int:
    """An fd of a memory file of so many bytes, all of them ours, that a worker may write to and do nothing else with.

    One that is lent can be emptied, by `take_back`, and nobody can add a seal that is against it.
    """
    fd = os.memfd_create("psie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)  # no program either
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | (fcntl.F_SEAL_SEAL if lent else fcntl.F_SEAL_SHRINK))
    except BaseException:
        os.close(fd)
        raise
    return fd


def take_back(fd: int) -> None:
    """Nothing of a lent file is left, whoever has it open or mapped, and nothing can be put there; closes the fd."""
    try:
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def copied(fd: int, size: int) -> memoryview:
    """The first `size` bytes of a file, as they are now; fewer where it has no more."""
    view, read = memoryview(bytearray(size)), 0
    while count := os.preadv(fd, [view[read:]], read):
        read += count
    return view[:read]


def seal(fd: int) -> None:
    """Nobody can change the file any more. Raises OSError (EBUSY) where somebody has it mapped and could write there."""
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def from_memory(fd: int) -> object:
    """What `in_memory` put there; closes the fd."""
    try:
        return marshal.loads(os.pread(fd, os.fstat(fd).st_size, 0))  # no shared offset: others may read it as well
    finally:
        os.close(fd)


def keep_only(fds: Sequence[int]) -> None:
    """Close every file descriptor of this process but the standard ones and `fds`."""
    last = 2
    for fd in sorted({fd for fd in fds if fd > 2}):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, DESCRIPTORS)

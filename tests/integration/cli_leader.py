"""A session leader on the terminal that is its stdin, as a shell is one: runs a command there and outlives it.

Arguments: the fd to report on ("PID", then "STATUS"), the fd to wait on at the end, stdin for the command ("-": the
terminal; "background": that too, which belongs to the leader), the command. Outliving it matters: a terminal whose
leader ends is reset by the kernel.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios


def main() -> None:
    report, wait, stdin, *command = sys.argv[1:]
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for fd in (int(report), int(wait)):
        os.set_inheritable(fd, False)
    background = stdin == "background"
    actions = [] if background or stdin == "-" else [(os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0)]
    pid = (
        os.posix_spawnp(command[0], command, os.environ, file_actions=actions, setpgroup=0)
        if background
        else os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(int(report), f"{pid}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(int(report), f"{status}\n".encode())
    os.read(int(wait), 1)


main()

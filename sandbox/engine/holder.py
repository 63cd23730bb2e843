"""The holder: a process that a network namespace belongs to which several sandboxes share, for NetworkIsolationManager.

Executed in a new network namespace (rootless in a new user namespace as well, which zygotes of its sandboxes then join), it
brings up what is to be there, hands the namespace out as a descriptor and waits until its caller has gone or closes its
socket. It runs nothing foreign. Must not import anything heavy. Sources: network_namespaces(7), veth(4).
"""

from __future__ import annotations

import os
import select
import sys

from sandbox.engine import channel
from sandbox.engine.zygote import CALLER, CONTROL
from sandbox.ns import network
from sandbox.ns import syscalls as sc


def main() -> None:
    """Never returns. Fds 3 and 4 are the control socket and the caller's pidfd, as a zygote has them."""
    channel.keep_only([CONTROL, CALLER])
    control = channel.from_fd(CONTROL)
    os.setsid()
    try:
        instruction, _ = channel.receive_instruction(control, 0)
        if instruction is None:
            os._exit(0)
        sc.resolve("clone3")
        try:
            network.set_up("lo")
            link = (
                network.helper_namespace(*network.begin_helper()) if instruction["link"] else None
            )  # its outer end goes with us
            if link is not None:
                network.add_link(link, instruction["link"], os.getpid())  # type: ignore[arg-type]
            namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            channel.send(control, "failed", {"text": error.strerror or str(error), "errno": error.errno or 0})
            os._exit(1)
        channel.send(control, "ready", {}, [namespace])
        poll = select.poll()
        for fd in (CONTROL, CALLER):
            poll.register(fd, select.POLLIN)
        poll.poll()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)

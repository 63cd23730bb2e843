"""A delegated scope of the user's systemd, for one zygote: how a user without an own cgroup gets limits.

systemd moves the zygote, never the caller, into the new scope and hands the scope's cgroup to the user; it removes it when
the last process in it has gone. Source: org.freedesktop.systemd1(5), CGROUP_DELEGATION.md of systemd.
"""

from __future__ import annotations

import os

from sandbox.cgroups import place
from sandbox.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TIMEOUT = 10.0  # seconds


def make(pid: int) -> str:
    """Have `pid` moved into a scope of its own; returns the folder in which leaves can be made.

    Raises ResourceError, with what systemd says, if it does not make one.
    """
    name = f"psie-{pid}.scope"
    properties = [
        ("Description", ("s", "sandboxes of psie")),
        ("Slice", ("s", "psie.slice")),
        ("PIDs", ("au", [pid])),
        ("Delegate", ("b", True)),
        ("CollectMode", ("s", "inactive-or-failed")),
        ("MemoryAccounting", ("b", True)),
        ("TasksAccounting", ("b", True)),
        ("CPUAccounting", ("b", True)),
        ("IOAccounting", ("b", True)),
    ]
    try:
        start(name, properties)
    except Exception as error:  # jeepney's own, OSError, TimeoutError: all mean that there is no scope
        raise ResourceError(
            f"the user's systemd makes no scope for sandboxes ({error}): run `systemctl --user status`, or give a delegated "
            "cgroup (systemd-run --user -p Delegate=yes)"
        ) from None
    folder = place.mount_point() + place.own_path(pid)
    engine = folder + "/engine"  # a cgroup with controllers for its children has no processes of its own
    os.mkdir(engine)
    place.write(engine + "/cgroup.procs", str(pid))
    return folder


def start(name: str, properties: list[tuple[str, Any]]) -> None:
    """StartTransientUnit, and wait for the end of its job: the call itself only queues one."""
    from jeepney import DBusAddress, MatchRule, new_method_call
    from jeepney.bus_messages import message_bus
    from jeepney.io.blocking import Proxy, open_dbus_connection

    manager = DBusAddress(
        "/org/freedesktop/systemd1", bus_name="org.freedesktop.systemd1", interface="org.freedesktop.systemd1.Manager"
    )
    bus = os.environ.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path=/run/user/{os.getuid()}/bus"
    with open_dbus_connection(bus=bus, auth_timeout=TIMEOUT) as connection:
        rule = MatchRule(type="signal", interface=manager.interface, member="JobRemoved", path=manager.object_path)
        Proxy(message_bus, connection).AddMatch(rule)
        with connection.filter(rule, bufsize=256) as signals:
            call = new_method_call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "fail", properties, []))
            answer = connection.send_and_get_reply(call, timeout=TIMEOUT)
            if answer.header.message_type.name == "error":
                raise ResourceError(str(answer.body[0]) if answer.body else "refused")
            job = answer.body[0]
            while True:
                message = connection.recv_until_filtered(signals, timeout=TIMEOUT)
                if message.body[1] == job:
                    if message.body[3] != "done":
                        raise ResourceError(f"the job ended as {message.body[3]}")
                    return

"""The net helper: encodes the request for a veth pair, once; the only process of the engine that imports pyroute2.

Run as a process of its own, it prints the RTM_NEWLINK message in hexadecimal. The result is the same on
every host of a byte order, so it is cached (see sandbox.engine.client) and pyroute2's 170 ms of import are paid once.
"""

from __future__ import annotations

import sys

from sandbox.ns.network import INNER, PID_PLACEHOLDER

OUTER = "psie%d"  # the kernel puts the first free number


def link_request() -> bytes:
    """RTM_NEWLINK for a veth pair: the outer end stays, the inner end is born in the network namespace of a pid."""
    from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST
    from pyroute2.netlink.rtnl import RTM_NEWLINK
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    peer = {"attrs": [("IFLA_IFNAME", INNER), ("IFLA_NET_NS_PID", PID_PLACEHOLDER)]}
    info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]}
    message = ifinfmsg()
    message["attrs"] = [("IFLA_IFNAME", OUTER), ("IFLA_LINKINFO", info)]
    message["header"]["type"] = RTM_NEWLINK
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    message["header"]["sequence_number"] = 1
    message.encode()
    return bytes(message.data)


def main() -> None:
    sys.stdout.write(link_request().hex())

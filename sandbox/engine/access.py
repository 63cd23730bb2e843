"""Which addresses a plugin may connect to: the decision alone, on addresses that somebody else has read.

It knows no names: those were resolved by the host when the sandbox was opened; what a name leads to later is another
matter and not allowed by it. Runs in the supervisor, so it must not import anything heavy.

Sources: RFC 4291, RFC 6890 and the IANA registries of special-purpose addresses, RFC 6052 (64:ff9b::/96), RFC 3056 (2002::/16).
"""

from __future__ import annotations

import _socket
import struct
import sys

AF_INET, AF_INET6 = _socket.AF_INET, _socket.AF_INET6
BITS = {AF_INET: 32, AF_INET6: 128}
CUT_OFF = "the sandbox is cut off from the network since it ran into a protection"
AF_NETLINK, NETLINK_ROUTE = 16, 0
RTM_NEWROUTE, RTM_GETROUTE, NLM_F_REQUEST, RTA_DST, RTN_LOCAL = 24, 26, 1, 1, 2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    Address = tuple[int, int]  # family, number


def parse(text: str) -> Address:
    """Raises OSError for anything but a plain IPv4 or IPv6 literal."""
    family = AF_INET6 if ":" in text else AF_INET
    return family, int.from_bytes(_socket.inet_pton(family, text), "big")


def show(address: Address) -> str:
    family, number = address
    return _socket.inet_ntop(family, number.to_bytes(BITS[family] // 8, "big"))


def unmapped(address: Address) -> Address:
    """IPv4 in IPv6 is IPv4."""
    family, number = address
    return (AF_INET, number & 0xFFFFFFFF) if family == AF_INET6 and number >> 32 == 0xFFFF else address


def plain(address: Address) -> Address:
    """What the kernel makes of it: the unspecified address is the machine itself."""
    family, number = unmapped(address)
    return family, number or (0x7F000001 if family == AF_INET else 1)


class Network:
    """An address and how many of its first bits count. It holds plain addresses."""

    def __init__(self, text: str) -> None:
        """`text` is an address or a network in CIDR notation. Raises OSError, ValueError."""
        text, slash, length = text.partition("/")
        address = parse(text)
        bits = BITS[address[0]]
        if slash and not (length.isascii() and length.isdecimal() and len(length) < 4 and int(length) <= bits):
            raise ValueError(f"give a network whose length is a number of bits from 0 to {bits}")
        self.shift = bits - int(length) if slash else 0
        if not self.shift:
            address = plain(address)
        elif self.shift <= BITS[AF_INET]:
            address = unmapped(address)
        self.family, number = address
        self.prefix = number >> self.shift

    def __contains__(self, address: Address) -> bool:
        return address[0] == self.family and address[1] >> self.shift == self.prefix


# Not of the public internet: the machine itself, its neighbours, its cloud (168.63.129.16), and what only looks like an
# address. Of IPv6 only 2000::/3 is given out.
SPECIAL = [
    Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
        *("168.63.129.16", "::/3", "2001::/23", "2001:db8::/32", "3fff::/20", "4000::/2", "8000::/1"),
    )
]
NAT64, SIX_TO_FOUR = Network("64:ff9b::/96"), Network("2002::/16")


def carried(address: Address) -> Address:
    """The IPv4 address in an IPv6 address that a gateway translates or unpacks; else itself."""
    if address in NAT64:
        return AF_INET, address[1] & 0xFFFFFFFF
    if address in SIX_TO_FOUR:
        return AF_INET, address[1] >> 80 & 0xFFFFFFFF
    return address


def is_special(address: Address) -> bool:
    """Whether it is no public address, or carries one that is none."""
    address = carried(plain(address))
    return any(address in network for network in SPECIAL)


def is_public(address: Address) -> bool:
    return not is_special(address) and not is_own(address)


def is_own(address: Address) -> bool:
    """Whether it is one of this machine's: what its routes say, see rtnetlink(7). Raises OSError."""
    family, number = address
    raw = number.to_bytes(BITS[family] // 8, "big")
    attribute = struct.pack("=HH", 4 + len(raw), RTA_DST) + raw
    route = struct.pack("=8BI", family, BITS[family], *bytes(6), 0)  # struct rtmsg
    head = struct.pack("=IHHII", 16 + len(route) + len(attribute), RTM_GETROUTE, NLM_F_REQUEST, 0, 0)  # struct nlmsghdr
    sock = _socket.socket(AF_NETLINK, _socket.SOCK_RAW, NETLINK_ROUTE)
    try:
        sock.send(head + route + attribute)
        answer = sock.recv(4096)
    finally:
        sock.close()
    return int.from_bytes(answer[4:6], sys.byteorder) == RTM_NEWROUTE and answer[16 + 7] == RTN_LOCAL


class Access:
    """Decides on connections by what a recipe's network access says.

    `access` has `allowed` and `blocked`, lists of (host, port or 0), and `ports`, those for hosts without one; `resolved` the
    addresses of names (see sandbox.network.resolve), and `nameservers`. An empty list allows nothing; None neither.
    """

    def __init__(self, access: Mapping[str, Any] | None, resolved: Mapping[str, Any]) -> None:
        self.ports = frozenset(access["ports"]) if access else frozenset()
        self.allowed = list(rules(access["allowed"], resolved.get("allowed", {}))) if access else []
        self.blocked = list(rules(access["blocked"], resolved.get("names", {}))) if access else []
        self.nameservers = [parse(text) for text in resolved.get("nameservers", ())]
        self.is_open = access is not None

    def decide(self, address: Address, port: int) -> tuple[bool, str]:
        """(whether a connection may be made, why)"""
        address = plain(address)
        if not self.is_open:
            return False, "the network is not permitted"
        forms = {address, carried(address)}
        for host, networks, only in self.blocked:
            if (networks is None or any(form in network for form in forms for network in networks)) and only in (0, port):
                return False, f"{host} is in blocked_hosts"
        if port == 53 and address in self.nameservers:
            return True, "a name server of this host"
        elsewhere = ""
        for host, networks, only in self.allowed:
            if any(address in network for network in networks) if networks is not None else is_public(address):
                if port == only if only else port in self.ports:
                    return True, f"{host} is allowed"
                elsewhere = host
        if elsewhere:
            return False, f"{elsewhere} is allowed, but not at port {port}"
        return False, "it is not in allowed_hosts"


def rules(
    hosts: Iterable[tuple[str, int]], names: Mapping[str, Sequence[str]]
) -> Iterable[tuple[str, list[Network] | None, int]]:
    """(host as the caller wrote it, its networks or None for every public address, port or 0)"""
    for host, port in hosts:
        if host == "*":
            yield host, None, port
        else:
            yield host, [Network(text) for text in names.get(host, (host,))], port

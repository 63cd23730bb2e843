"""Which addresses a plugin may connect to: the decision alone, on addresses that somebody else has read.

It knows numbers only. Names were resolved by the host when the sandbox was opened; what a name leads to later is another
matter and not allowed by it. Runs in the supervisor, so it must not import anything heavy.

Sources: RFC 4291, RFC 6890 and the IANA registries of special-purpose addresses, RFC 6052 (64:ff9b::/96), RFC 3056 (2002::/16).
"""

from __future__ import annotations

import _socket

AF_INET, AF_INET6 = _socket.AF_INET, _socket.AF_INET6
BITS = {AF_INET: 32, AF_INET6: 128}

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


class Network:
    """An address and how many of its first bits count."""

    def __init__(self, text: str) -> None:
        """`text` is an address or a network in CIDR notation. Raises OSError, ValueError."""
        address, slash, length = text.partition("/")
        self.family, number = parse(address)
        bits = BITS[self.family]
        if slash and not (length.isascii() and length.isdecimal() and len(length) < 4 and int(length) <= bits):
            raise ValueError(f"give a network whose length is a number of bits from 0 to {bits}")
        self.shift = bits - int(length) if slash else 0
        self.prefix = number >> self.shift

    def __contains__(self, address: Address) -> bool:
        return address[0] == self.family and address[1] >> self.shift == self.prefix


# Not of the public internet: the machine itself, its neighbours, and what only looks like an address.
SPECIAL = [
    Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
        *("::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "fc00::/7", "fe80::/9", "ff00::/8"),
    )
]
MAPPED, NAT64, SIX_TO_FOUR = Network("::ffff:0:0/96"), Network("64:ff9b::/96"), Network("2002::/16")


def plain(address: Address) -> Address:
    """What the kernel makes of it: IPv4 in IPv6 is IPv4, and the unspecified address is the machine itself."""
    if address in MAPPED:
        address = AF_INET, address[1] & 0xFFFFFFFF
    family, number = address
    return family, number or (0x7F000001 if family == AF_INET else 1)


def is_special(address: Address) -> bool:
    """Whether it is no public address, or carries one that is none."""
    address = plain(address)
    if address in NAT64:
        address = AF_INET, address[1] & 0xFFFFFFFF
    elif address in SIX_TO_FOUR:
        address = AF_INET, address[1] >> 80 & 0xFFFFFFFF
    return any(address in network for network in SPECIAL)


class Access:
    """Decides on connections by what a recipe's network access says.

    `access` has `allowed` and `blocked`, lists of (host, port or 0), and `ports`, those for hosts without one; `resolved`
    the addresses of the names among the hosts, and `nameservers`. An empty list allows nothing; None neither.
    """

    def __init__(self, access: Mapping[str, Any] | None, resolved: Mapping[str, Any]) -> None:
        self.ports = frozenset(access["ports"]) if access else frozenset()
        self.names: dict[str, Sequence[str]] = resolved.get("names", {})
        self.allowed = list(self._rules(access["allowed"])) if access else []
        self.blocked = list(self._rules(access["blocked"])) if access else []
        self.nameservers = [parse(text) for text in resolved.get("nameservers", ())]
        self.is_open = access is not None

    def _rules(self, hosts: Iterable[tuple[str, int]]) -> Iterable[tuple[str, list[Network] | None, int]]:
        """(host as the caller wrote it, its networks or None for every public address, port or 0)"""
        for host, port in hosts:
            if host == "*":
                yield host, None, port
            else:
                yield host, [Network(text) for text in self.names.get(host, (host,))], port

    def decide(self, address: Address, port: int) -> tuple[bool, str]:
        """(whether a connection may be made, why)"""
        address = plain(address)
        if not self.is_open:
            return False, "the network is not permitted"
        for host, networks, only in self.blocked:
            if (networks is None or any(address in network for network in networks)) and only in (0, port):
                return False, f"{host} is in blocked_hosts"
        if port == 53 and address in self.nameservers:
            return True, "a name server of this host"
        elsewhere = ""
        for host, networks, only in self.allowed:
            if any(address in network for network in networks) if networks is not None else not is_special(address):
                if port == only if only else port in self.ports:
                    return True, f"{host} is allowed"
                elsewhere = host
        if elsewhere:
            return False, f"{elsewhere} is allowed, but not at port {port}"
        return False, "it is not in allowed_hosts"

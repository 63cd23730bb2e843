"""Hosts that a plugin may reach: how a caller writes them, and what the names among them stand for when a sandbox opens.

Runs on the host only. It must not decide on connections: that is sandbox.engine.access, in the supervisor.
"""

from __future__ import annotations

import socket

from sandbox.engine.access import Network, is_public, parse, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from sandbox.recipe_data import Recipe

NAME_CHARACTERS = 253  # RFC 1035, 2.3.4, without the last dot
LABEL_CHARACTERS = 63
MOST_NAMES = 256  # in the lists of one sandbox: each is a question to the host's resolver
MOST_CHARACTERS = 40_000  # of all that a sandbox is told: it travels in one message
RESOLV_CONF = "/etc/resolv.conf"
UNCLEAR = "\u00df\u03c2\u200c\u200d"  # what IDNA 2003, which Python has, takes for something else than IDNA 2008 does
LINK_LOCAL = Network("fe80::/10")
HOST_CONF = "multi on\n"  # host.conf(5): every address that a name has in /etc/hosts, not only the first
FILES_ONLY = "passwd: files\ngroup: files\nhosts: files\n"
FILES_AND_DNS = "passwd: files\ngroup: files\nhosts: files dns\n"


def split(text: str) -> tuple[str, int]:
    """(host, port or 0) of an entry in a list of hosts: a name, an address, a network in CIDR notation or "*", each of them
    alone or with ":port" behind it; IPv6 stands in brackets then.

    Names come back in lower case, without a last dot, as ASCII (IDNA). Raises ValueError, which says what to write instead.
    """
    if not text or not text.isprintable():
        raise ValueError('give a host name, an IP address, a network such as 10.0.0.0/8, or "*" for every public host')
    if "://" in text:
        raise ValueError("give host or host:port, without a scheme")
    if "@" in text:
        raise ValueError("give host or host:port, without user and password")
    if "%" in text:
        raise ValueError("give the address without a zone")
    host, rest = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or rest[:1] not in ("", ":") or ":" not in host:
            raise ValueError("give an IPv6 address in brackets as [::1] or [::1]:443")
    elif text.count(":") == 1:
        host = text.partition(":")[0]
        rest = text[len(host) :]
    return _host(host), _port(rest[1:]) if rest else 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= 65535):
        raise ValueError("give a port from 1 to 65535")
    return int(text)


def _host(host: str) -> str:
    if host == "*":
        return host
    if "/" in host:
        return _network(host)
    if ":" in host:
        return _address(host)
    if not host.isascii():
        if any(character in host for character in UNCLEAR):
            raise ValueError("give this host name in its ASCII form (xn--...): there are two")
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            raise ValueError("give a host name that IDNA knows") from None
    name = host.removesuffix(".").lower()
    last = name.rpartition(".")[2]
    if last.isdecimal() or last.startswith("0x"):  # what inet_aton(3) takes for an address, in whatever notation
        return _address(name)
    labels = name.split(".")
    plain = all(label.replace("-", "").replace("_", "").isalnum() for label in labels)
    if not plain or len(name) > NAME_CHARACTERS or any(len(each) > LABEL_CHARACTERS or each[0] == "-" for each in labels):
        raise ValueError("give a host name, without path or wildcard")
    return name


def _address(text: str) -> str:
    try:
        address = parse(text)
    except OSError:
        raise ValueError("give IPv4 as four decimal numbers (10.0.0.1), IPv6 as in ::1") from None
    if address in LINK_LOCAL:
        raise ValueError("give an address that needs no zone: a link-local one means nothing without")
    return text.lower()


def _network(text: str) -> str:
    try:
        network = Network(text)
        if parse(text.partition("/")[0])[1] & ((1 << network.shift) - 1):
            raise ValueError("give a network by its first address, as in 10.0.0.0/8")
    except OSError:
        raise ValueError("give a network in CIDR notation, as in 10.0.0.0/8, or a host without a path") from None
    return text.lower()


def join(host: str, port: int) -> str:
    """What `split` took apart."""
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_name(host: str) -> bool:
    return host != "*" and ":" not in host and "/" not in host and not host.rpartition(".")[2].isdecimal()


def names(access: Mapping[str, Any] | None) -> list[str]:
    """The names in a recipe's network access; each has to be resolved."""
    if access is None:
        return []
    return list(dict.fromkeys(host for host, _ in (*access["allowed"], *access["blocked"]) if is_name(host)))


def needs_look(access: Mapping[str, Any] | None) -> bool:
    """Whether a sandbox of it depends on what names and name servers are at its opening."""
    return bool(names(access)) or wants_dns(access)


def wants_dns(access: Mapping[str, Any] | None) -> bool:
    """Whether every name may be asked for: only then can the plugin ask the host's name servers, over TCP."""
    return access is not None and any(host == "*" for host, _ in access["allowed"])


def resolve(access: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a sandbox is told about its network when it opens. Blocks for as long as the host's resolver takes.

    `names`: addresses of each name; `allowed`: those that count for an allowed name, which private ones and this machine's do
    not; `refused`: (name, such an address as it would have to be listed) where it is not listed at all, and so left out;
    `unknown`: names without any; `nameservers`; `files`: what lies in the plugin's /etc.

    Raises ValueError where names stand for too many addresses, or where one that is to be blocked has none: it may have some
    later, and then `allowed` could lead there.
    """
    if not needs_look(access):
        return {}
    assert access is not None
    if len(names(access)) > MOST_NAMES:
        what = f"allowed_hosts and blocked_hosts have {len(names(access))} names, and each is looked up for every sandbox"
        raise ValueError(f"{what}: give at most {MOST_NAMES}, or addresses")
    listed = [Network(host) for host, _ in access["allowed"] if host != "*" and not is_name(host)]
    allowed, blocked = ({host for host, _ in access[which]} for which in ("allowed", "blocked"))
    found: dict[str, list[str]] = {}
    counting: dict[str, list[str]] = {}
    refused = []
    for name in names(access):
        found[name], counting[name] = addresses, _ = [], []
        for text in _addresses(name):
            address = parse(text)
            if is_public(plain(address)):
                counting[name].append(text)
            elif name in allowed and not any(plain(address) in network for network in listed):
                refused += [[name, join(text, port)] for host, port in access["allowed"] if host == name]
                continue  # who answers for the name does not decide about these
            addresses.append(text)
        if name in blocked and not addresses and name not in dict(refused) and allowed:
            raise ValueError(f"{name} in blocked_hosts has no address here, so it cannot be blocked: give its addresses")
    dns = wants_dns(access)
    known = "".join(f"{text} {name}\n" for name in sorted(allowed & found.keys()) for text in found[name])
    nameservers = _nameservers() if dns else []
    dns_files = {RESOLV_CONF: "".join(f"nameserver {address}\n" for address in nameservers)} if dns else {}
    told = {
        "names": found,
        "allowed": {name: addresses for name, addresses in counting.items() if name in allowed},
        "refused": refused,
        "unknown": [name for name, addresses in found.items() if not addresses and name not in dict(refused)],
        "nameservers": nameservers,
        "files": {
            "/etc/hosts": hosts_file(access) + known,
            "/etc/host.conf": HOST_CONF,
            "/etc/nsswitch.conf": FILES_AND_DNS if dns else FILES_ONLY,
            **dns_files,
        },
    }
    if len(repr(told)) > MOST_CHARACTERS:
        raise ValueError("the names in allowed_hosts and blocked_hosts stand for too many addresses: allow networks instead")
    return told


def hosts_file(access: Mapping[str, Any] | None) -> str:
    """What is in the plugin's /etc/hosts in any case: no address that cannot be reached, since clients try all of a name's."""
    allowed = access["allowed"] if access is not None else ()
    has_six = any(parse("::1") in Network(host) for host, _ in allowed if host != "*" and not is_name(host))
    return "127.0.0.1 localhost\n" + ("::1 localhost\n" if has_six else "")


def for_python(recipe: Recipe, resolved: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names that Python's resolver has to be told, because without a mount namespace there is no /etc/hosts to tell it."""
    if "mnt" in recipe.namespaces or not resolved:
        return {}
    return {host: resolved["names"][host] for host, _ in recipe.network["access"]["allowed"] if host in resolved["names"]}


def _addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(each[4][0]).partition("%")[0] for each in found))


def _nameservers() -> list[str]:
    """Those of resolv.conf(5); without any it is this machine."""
    found = []
    try:
        with open(RESOLV_CONF) as file:
            for line in file:
                word, _, value = line.partition(" ")
                if word == "nameserver":
                    found.append(value.strip().partition("%")[0])
    except OSError:
        pass  # resolv.conf(5): then the name server on this machine is asked
    return [text for text in found if _is_address(text)] or ["127.0.0.1"]


def _is_address(text: str) -> bool:
    try:
        parse(text)
    except OSError:
        return False
    return True

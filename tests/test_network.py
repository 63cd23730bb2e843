"""Hosts as callers write them, what their names stand for, and the decision on an address."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sandbox import network
from sandbox.engine import access

Addresses = Callable[[dict[str, Sequence[str]]], None]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Addresses:
    """Tell the host's resolver which names there are."""

    def tell(names: dict[str, Sequence[str]]) -> None:
        monkeypatch.setattr(network, "_addresses", lambda name: list(names.get(name, ())))

    return tell


def wanted(allowed: Sequence[str], blocked: Sequence[str] = (), ports: Sequence[int] = (80, 443)) -> dict[str, Any]:
    """A recipe's network access."""
    return {"allowed": list(map(network.split, allowed)), "blocked": list(map(network.split, blocked)), "ports": list(ports)}


def decide(where: str, port: int, allowed: Sequence[str], blocked: Sequence[str] = (), **resolved: Any) -> tuple[bool, str]:
    return access.Access(wanted(allowed, blocked), resolved).decide(access.parse(where), port)


# -- how hosts are written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("example.com", "example.com", 0),
        ("EXAMPLE.com.", "example.com", 0),
        ("example.com:8080", "example.com", 8080),
        ("localhost", "localhost", 0),
        ("müller.de:80", "xn--mller-kva.de", 80),
        ("_service.example", "_service.example", 0),
        ("10.0.0.1", "10.0.0.1", 0),
        ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("::1", "::1", 0),
        ("[::1]", "::1", 0),
        ("[2001:DB8::1]:443", "2001:db8::1", 443),
        ("10.0.0.0/8", "10.0.0.0/8", 0),
        ("10.0.0.0/8:443", "10.0.0.0/8", 443),
        ("[fd00::/8]:443", "fd00::/8", 443),
        ("*", "*", 0),
        ("*:443", "*", 443),
    ],
)
def test_hosts(text: str, host: str, port: int) -> None:
    assert network.split(text) == (host, port)
    assert network.split(network.join(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "give a host name"),
        ("a\0b", "give a host name"),
        ("a\u200bb.com", "give a host name"),
        ("a b", "without path or wildcard"),
        ("a..b", "without path or wildcard"),
        (".", "without path or wildcard"),
        ("-a.de", "without path or wildcard"),
        ("*.example.com", "without path or wildcard"),
        ("a" * 64 + ".de", "without path or wildcard"),
        (".".join(["a" * 60] * 5), "without path or wildcard"),
        ("a.de/path", "without a path"),
        ("https://a.de", "without a scheme"),
        ("user@a.de", "without user and password"),
        ("fe80::1%eth0", "without a zone"),
        ("[fe80::1]:80", "needs no zone"),
        ("stra\u00dfe.example", "in its ASCII form"),
        ("a.de:0", "port from 1 to 65535"),
        ("a.de:65536", "port from 1 to 65535"),
        ("a.de:", "port from 1 to 65535"),
        ("a.de:٣", "port from 1 to 65535"),
        ("a.de:-1", "port from 1 to 65535"),
        ("a:b:c", "four decimal numbers"),
        ("2130706433", "four decimal numbers"),
        ("0177.0.0.1", "four decimal numbers"),
        ("0x7f.0.0.1", "four decimal numbers"),
        ("0x7f。1", "four decimal numbers"),
        ("127.1", "four decimal numbers"),
        ("[10.0.0.1]:80", "in brackets as"),
        ("[::1", "in brackets as"),
        ("[::1]x", "in brackets as"),
        ("10.0.0.0/33", "number of bits from 0 to 32"),
        ("10.0.0.0/", "number of bits from 0 to 32"),
        ("10.1.0.0/8", "by its first address"),
        ("::ffff:0:0/80", "by its first address"),
    ],
)
def test_hosts_that_are_none(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        network.split(text)


# -- what is special -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("0.0.0.0", "10.1.2.3", "100.100.100.200", "127.0.0.1", "169.254.169.254", "172.31.0.1", "192.168.1.1"),
        *("168.63.129.16", "192.0.0.192", "224.0.0.1", "255.255.255.255", "198.18.0.1"),
        *("::", "::1", "::7f00:1", "::ffff:10.0.0.1", "fe80::1", "fec0::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:a9fe:a9fe::1", "2001:0:1::1", "3fff::1", "4000::1", "5f00::1"),
    ],
)
def test_special_addresses(text: str) -> None:
    assert access.is_special(access.parse(text))
    assert decide(text, 443, ["*"])[0] is False


@pytest.mark.parametrize("text", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2a00::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(text: str) -> None:
    assert not access.is_special(access.parse(text))
    assert decide(text, 443, ["*"]) == (True, "* is allowed")


def test_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a public one may be this machine's: what listens there is perhaps meant for nobody outside."""
    assert access.is_own(access.parse("127.0.0.1"))
    assert access.is_own(access.parse("127.9.9.9"))
    assert not access.is_own(access.parse("8.8.8.8"))
    assert not access.is_own(access.parse("2a00::1"))
    monkeypatch.setattr(access, "is_own", lambda address: True)
    assert decide("8.8.8.8", 443, ["*"]) == (False, "it is not in allowed_hosts")
    assert decide("8.8.8.8", 443, ["*", "8.8.8.8"]) == (True, "8.8.8.8 is allowed")


# -- the decision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "port", "allowed", "reason"),
    [
        ("127.0.0.1", 80, ["127.0.0.1"], "127.0.0.1 is allowed"),
        ("127.0.0.1", 81, ["127.0.0.1:81"], "127.0.0.1 is allowed"),
        ("0.0.0.0", 80, ["127.0.0.1"], "127.0.0.1 is allowed"),
        ("127.0.0.1", 80, ["0.0.0.0"], "0.0.0.0 is allowed"),
        ("::", 80, ["::1"], "::1 is allowed"),
        ("::ffff:127.0.0.1", 80, ["127.0.0.0/8"], "127.0.0.0/8 is allowed"),
        ("127.0.0.1", 80, ["::ffff:127.0.0.1"], "::ffff:127.0.0.1 is allowed"),
        ("127.0.0.1", 80, ["::ffff:127.0.0.0/104"], "::ffff:127.0.0.0/104 is allowed"),
        ("10.1.2.3", 443, ["10.0.0.0/8"], "10.0.0.0/8 is allowed"),
    ],
)
def test_allowed(where: str, port: int, allowed: list[str], reason: str) -> None:
    assert decide(where, port, allowed) == (True, reason)


@pytest.mark.parametrize(
    ("where", "port", "allowed", "reason"),
    [
        ("127.0.0.1", 80, [], "it is not in allowed_hosts"),
        ("127.0.0.1", 81, ["127.0.0.1"], "127.0.0.1 is allowed, but not at port 81"),
        ("127.0.0.1", 0, ["127.0.0.1"], "127.0.0.1 is allowed, but not at port 0"),
        ("127.0.0.1", 80, ["127.0.0.1:81"], "127.0.0.1 is allowed, but not at port 80"),
        ("127.0.0.1", 80, ["::1"], "it is not in allowed_hosts"),
        ("127.0.0.1", 80, ["::/0"], "it is not in allowed_hosts"),
        ("::1", 80, ["0.0.0.0/0"], "it is not in allowed_hosts"),
        ("11.0.0.0", 80, ["10.0.0.0/8"], "it is not in allowed_hosts"),
    ],
)
def test_not_allowed(where: str, port: int, allowed: list[str], reason: str) -> None:
    assert decide(where, port, allowed) == (False, reason)


@pytest.mark.parametrize(
    ("where", "blocked"),
    [
        ("8.8.8.8", "8.8.8.8"),
        ("8.8.8.8", "8.0.0.0/8"),
        ("8.8.8.8", "8.8.8.8:443"),
        ("8.8.8.8", "*"),
        ("8.8.8.8", "::ffff:8.8.8.8"),
        ("8.8.8.8", "::ffff:0:0/96"),
        ("8.8.8.8", "bad.example"),
        ("::ffff:8.8.8.8", "8.8.8.8"),
        ("64:ff9b::808:808", "8.8.8.8"),
        ("2002:808:808::1", "8.8.8.8"),
        ("127.0.0.1", "0.0.0.0"),
    ],
)
def test_blocked_wins(where: str, blocked: str) -> None:
    allowed = ["*", "127.0.0.1", "8.8.8.8", "2002:808:808::1"]
    assert decide(where, 443, allowed)[0] is True
    names = {"bad.example": ["2a00::1", "::ffff:8.8.8.8"]}
    verdict, reason = decide(where, 443, allowed, [blocked], names=names)
    assert (verdict, reason) == (False, f"{network.split(blocked)[0]} is in blocked_hosts")


def test_a_blocked_port_is_only_that_port() -> None:
    assert decide("8.8.8.8", 80, ["*"], ["8.8.8.8:443"])[0] is True


def test_names_are_their_addresses() -> None:
    resolved = {"allowed": {"a.example": ["10.0.0.1", "fd00::1"], "none.example": []}}
    known = access.Access(wanted(["a.example", "none.example"]), resolved)
    assert known.decide(access.parse("10.0.0.1"), 80) == (True, "a.example is allowed")
    assert known.decide(access.parse("fd00::1"), 80)[0] is True
    assert known.decide(access.parse("10.0.0.2"), 80)[0] is False


def test_name_servers() -> None:
    """Over TCP, and nothing else of theirs; blocked ones are blocked."""
    assert decide("10.0.0.53", 53, ["*"], nameservers=["10.0.0.53"]) == (True, "a name server of this host")
    assert decide("10.0.0.53", 443, ["*"], nameservers=["10.0.0.53"])[0] is False
    assert decide("10.0.0.53", 53, ["*"], ["10.0.0.0/8"], nameservers=["10.0.0.53"])[0] is False


def test_without_permission_nothing() -> None:
    assert access.Access(None, {}).decide(access.parse("8.8.8.8"), 443) == (False, "the network is not permitted")


# -- names -----------------------------------------------------------------------------------------------------------------


def test_private_addresses_of_a_name_have_to_be_listed(known: Addresses) -> None:
    known({"db.example": ["8.8.8.8", "10.0.0.5", "169.254.169.254", "::1", "::ffff:10.0.0.6"]})
    found = network.resolve(wanted(["db.example"]))
    assert found["names"] == {"db.example": ["8.8.8.8"]}
    assert [address for _, address in found["refused"]] == ["10.0.0.5", "169.254.169.254", "::1", "::ffff:10.0.0.6"]
    assert "8.8.8.8 db.example\n" in found["files"]["/etc/hosts"]
    assert "10.0.0.5" not in found["files"]["/etc/hosts"]
    listed = network.resolve(wanted(["db.example", "10.0.0.0/8:5432", "::1"]))
    assert listed["names"] == {"db.example": ["8.8.8.8", "10.0.0.5", "::1", "::ffff:10.0.0.6"]}
    assert listed["allowed"] == {"db.example": ["8.8.8.8"]}
    assert (listed["refused"], listed["unknown"]) == ([["db.example", "169.254.169.254"]], [])
    for address, port in (("10.0.0.5", 80), ("10.0.0.5", 5432), ("::1", 80)):
        verdict, reason = access.Access(wanted(["db.example", "10.0.0.0/8:5432", "::1"]), listed).decide(
            access.parse(address), port
        )
        assert verdict is ((address, port) != ("10.0.0.5", 80))  # that is what listing it for another port does not say
        assert "db.example" not in reason


def test_what_would_have_to_be_listed_has_the_port(known: Addresses) -> None:
    known({"db.example": ["10.0.0.5", "fd00::5"]})
    found = network.resolve(wanted(["db.example:5432", "db.example"]))
    assert [address for _, address in found["refused"]] == ["10.0.0.5:5432", "10.0.0.5", "[fd00::5]:5432", "fd00::5"]


def test_localhost_has_no_address_that_cannot_be_reached() -> None:
    assert network.hosts_file(None) == network.hosts_file(wanted(["127.0.0.1:80"])) == "127.0.0.1 localhost\n"
    assert network.hosts_file(wanted(["[::1]:80"])) == "127.0.0.1 localhost\n::1 localhost\n"


def test_this_machines_addresses_behind_a_name_have_to_be_listed_too(known: Addresses, monkeypatch: pytest.MonkeyPatch) -> None:
    known({"db.example": ["8.8.8.8", "8.8.4.4"]})
    monkeypatch.setattr(access, "is_own", lambda address: address == access.parse("8.8.4.4"))
    assert network.resolve(wanted(["db.example"]))["names"] == {"db.example": ["8.8.8.8"]}
    assert network.resolve(wanted(["db.example", "8.8.4.4"]))["names"] == {"db.example": ["8.8.8.8", "8.8.4.4"]}


def test_a_blocked_name_keeps_its_private_addresses(known: Addresses) -> None:
    known({"db.example": ["10.0.0.5"]})
    assert network.resolve(wanted(["10.0.0.0/8"], ["db.example"]))["names"] == {"db.example": ["10.0.0.5"]}


def test_a_blocked_name_without_address(known: Addresses) -> None:
    """Later it may have one, and then "*" would lead there. Where nothing is allowed that does not matter."""
    known({})
    with pytest.raises(ValueError, match=r"^bad\.example in blocked_hosts has no address here"):
        network.resolve(wanted(["*"], ["bad.example"]))
    assert network.resolve(wanted([], ["bad.example"]))["unknown"] == ["bad.example"]
    assert network.resolve(wanted(["good.example"]))["unknown"] == ["good.example"]


def test_many_addresses(known: Addresses) -> None:
    name = ".".join(["a" * 60] * 4)
    known({name: [f"2a00::{number:x}" for number in range(100)]})
    assert network.resolve(wanted([name]))["files"]["/etc/hosts"].count(name) == 100
    known({name: [f"2a00::{number:x}" for number in range(1000)]})
    with pytest.raises(ValueError, match="too many addresses"):
        network.resolve(wanted([name]))


def test_nothing_to_look_up() -> None:
    assert network.resolve(None) == {}
    assert network.resolve(wanted(["10.0.0.0/8", "::1"], ["10.0.0.1"])) == {}


def test_the_resolver_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zones go, an address counts once, and a name that fails has none."""

    def answer(name: str, *_: object, **__: object) -> list[Any]:
        if name != "a.example":
            raise socket.gaierror(-2, "Name or service not known")
        return [(10, 1, 6, "", ("fe80::1%lo", 0, 0, 1)), (2, 1, 6, "", ("8.8.8.8", 0)), (2, 2, 17, "", ("8.8.8.8", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    found = network.resolve(wanted(["a.example", "b.example"]))
    assert found["names"] == {"a.example": ["8.8.8.8"], "b.example": []}
    assert found["refused"] == [["a.example", "fe80::1"]]
    assert found["unknown"] == ["b.example"]


def test_dns_only_for_every_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    config = tmp_path / "resolv.conf"
    config.write_text("# none\nnameserver 10.0.0.53\nnameserver fe80::1%eth0\nnameserver nonsense\nsearch example\n")
    monkeypatch.setattr(network, "RESOLV_CONF", str(config))
    found = network.resolve(wanted(["*"]))
    assert found["nameservers"] == ["10.0.0.53", "fe80::1"]
    assert "hosts: files dns" in found["files"]["/etc/nsswitch.conf"]
    monkeypatch.setattr(network, "RESOLV_CONF", str(tmp_path / "none"))
    assert network.resolve(wanted(["*:443"]))["nameservers"] == ["127.0.0.1"]

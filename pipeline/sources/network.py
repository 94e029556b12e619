"""Whom a download may talk to, and whether this node can talk to anybody.

A list that strangers wrote must not make the mill read what only this machine can reach: private, loopback,
link-local and metadata addresses are refused. What is checked is the address that the socket is really
connected to, after every redirect and every look-up, so a name that resolves otherwise the second time does not
help. Through an HTTP proxy the look-up is the proxy's, and so is the check: here only names and literal addresses
are looked at. A person who types an address means it; CLIPMILL_ALLOW_PRIVATE=1 allows all of them.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import urllib.parse
from collections.abc import Callable

from pipeline.faults import Fault, SourceFault, TransientFault, WorkerFault

ALLOW = "CLIPMILL_ALLOW_PRIVATE"
PUBLIC, HOST, ANY = "public", "host", "any"  # Source.reach
HOW = f"if you mean it, allow it with --allow-private or {ALLOW}=1"
LOCAL_NAMES = ("localhost", "local", "internal", "localdomain", "home.arpa", "lan", "intranet")
KNOWN = ("example.com", "wikipedia.org", "one.one.one.one")  # names that any network's DNS knows
ROUTES = (("1.1.1.1", socket.AF_INET), ("2606:4700::1111", socket.AF_INET6))  # no packet is sent there
NOT_GLOBAL = tuple(
    map(
        ipaddress.ip_network,
        # besides what `is_global` knows: protocol assignments (Oracle's metadata), multicast, site-local
        ("192.0.0.0/24", "224.0.0.0/4", "ff00::/8", "fec0::/10"),
    )
)
EMBEDS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")))

_reached: set[str] = set()  # a few names of hosts that this process has been connected to

Create = Callable[..., socket.socket]


def allowed_by_environment() -> bool:
    return os.environ.get(ALLOW, "") not in ("", "0")


def is_private(address: str) -> bool:
    """Is an IP address, as a socket has it, none of the public internet's? IPv4 inside IPv6 counts as itself."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(ip in network for network in EMBEDS):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(v4 is not None and is_private(str(v4)) for v4 in inner):
            return True
        if ip.ipv4_mapped is not None:
            return False
    return not ip.is_global or any(ip in network for network in NOT_GLOBAL if network.version == ip.version)


def named_private(host: str) -> bool:
    """Does a name say by itself, without being looked up, that it is a private address?"""
    host = host.lower().rstrip(".").partition("%")[0]
    if any(host == name or host.endswith(f".{name}") for name in LOCAL_NAMES) or host == "metadata":
        return True
    try:
        return is_private(host)
    except ValueError:
        pass
    try:
        return is_private(socket.inet_ntoa(socket.inet_aton(host)))  # 2130706433, 0x7f.1, 0177.0.0.1
    except (OSError, ValueError):
        return False


def host_of(address: str) -> str:
    """The host of an address or of 'host:port', lower case; '' where there is none. Raises ValueError."""
    return (urllib.parse.urlsplit(address if "://" in address else f"//{address}").hostname or "").lower()


def free_hosts(address: str, reach: str) -> frozenset[str] | None:
    """Hosts that need no check; None: no host does."""
    if reach == ANY or allowed_by_environment():
        return None
    return frozenset([host_of(address)]) if reach == HOST else frozenset()


def refusal(uri: str, host: str, ip: str = "") -> SourceFault:
    where = f"{host} ({ip})" if ip and ip != host else host
    return SourceFault(f"{uri}: {where} is no public address, and lists may not name those; {HOW}")


def check_name(uri: str, host: str) -> None:
    """Look a name up and refuse it where any of its addresses is private. Raises SourceFault.

    For clients that make their own connections: they look it up once more, which this cannot see.
    """
    if named_private(host):
        raise refusal(uri, host)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return  # the client will say what is wrong
    for *_, sockaddr in found:
        if is_private(str(sockaddr[0])):
            raise refusal(uri, host, str(sockaddr[0]))


def connector(uri: str, free: frozenset[str] | None) -> Create:
    """A `socket.create_connection` that connects to public addresses, and to `free` hosts (None: to all).

    The connection raises SourceFault where the host has private addresses only.
    """

    def connect(
        address: tuple[str, int], timeout: float | None = None, source_address: tuple[str, int] | None = None
    ) -> socket.socket:
        host, port = address
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if free is not None and host.lower() not in free:
            public = [f for f in found if not is_private(str(f[4][0]))]
            if found and not public:
                raise refusal(uri, host, str(found[0][4][0]))
            found = public
        trouble: OSError = OSError(errno.EADDRNOTAVAIL, "no address")
        for family, kind, proto, _, sockaddr in found:
            sock = socket.socket(family, kind, proto)
            try:
                sock.settimeout(timeout)
                if source_address:
                    sock.bind(source_address)
                sock.connect(sockaddr)
            except OSError as e:
                sock.close()
                trouble = e
                continue
            if len(_reached) < 3 and re.search(r"[a-z]", host.rpartition(".")[2], re.I) and ":" not in host:
                _reached.add(host)
            return sock
        raise trouble

    return connect


# Whose fault it is ---------------------------------------------------------------------------------


def fault_of(uri: str, said: str, cause: BaseException | None, proxy: str = "") -> Fault:
    """The fault of a host that could not be reached, tries and all.

    A name nobody knows is the source's, a host that does not answer the moment's; where no name can be looked
    up, or no route leads out, it is this node's. `proxy` is the host that was asked in its stead.
    """
    reason = getattr(cause, "reason", cause)
    no_name = isinstance(reason, socket.gaierror)
    code = reason.errno if isinstance(reason, OSError) else None
    if proxy and (no_name or code == errno.ECONNREFUSED):
        return WorkerFault(
            f"{uri}: the proxy {proxy} cannot be reached ({said}); check http_proxy and https_proxy"
        )
    if no_name and not any(map(_resolves, [*_reached, *KNOWN])):
        return WorkerFault(
            f"{uri}: {said}, and no other name can be looked up here either; this machine has no network or no DNS"
        )
    if code in (errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH) and not any(map(_routed, ROUTES)):
        return WorkerFault(
            f"{uri}: {said}, and no route leads out of this machine; connect it to the network"
        )
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        return SourceFault(f"{uri}: {said}: nobody knows this host; the link is dead")
    return TransientFault(f"{uri}: {said}; the next run tries it again", tried=True)


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError):
        return False


def _routed(route: tuple[str, int]) -> bool:
    """Is there a way to a public address? Connecting a UDP socket sends nothing."""
    address, family = route
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect((address, 53))
    except OSError:
        return False
    return True

"""Where the server listens: taken before a model is loaded, told once it answers."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any

from gptj8.runtime.errors import UserError

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # IPv6 on a machine that has none


def bind(host: str, port: int) -> list[socket.socket]:
    """Take a port at every address of a host, as asyncio would.

    Nothing listens yet: whoever comes before the model is loaded is turned away at once.

    Args:
        host: a name or an address.
        port: 0: one that is free, the same at all addresses.

    Raises:
        UserError: if it is in use, or cannot be had.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            at = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_bound(family, (address[0], at, *address[2:])))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
        if absent is not None and not sockets:
            raise absent
    except (OSError, OverflowError, UnicodeError) as error:  # a host that is no name
        for taken in sockets:
            taken.close()
        raise UserError(f"--host {host} --port {port}: {error}") from None
    return sockets


def listen(host: str, sockets: Sequence[socket.socket]) -> str:
    """Begin to listen at what `bind` took, and return the URL.

    Raises:
        UserError: if another has bound the same port meanwhile, and listened first.
    """
    port = sockets[0].getsockname()[1]
    try:
        for taken in sockets:
            taken.listen()
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    return url_of(host, port)


def url_of(host: str, port: int) -> str:
    """Return the URL of a port at a host, a name or an address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    # Of a socket that does not say TCP, asyncio lets small packets wait: 40 ms an answer.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 has a socket of its own
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(address)
    except BaseException:
        taken.close()
        raise
    return taken

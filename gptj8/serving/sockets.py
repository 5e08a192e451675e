"""Sockets of the server: bound before the model is loaded, listening once it is ready."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any

from gptj8.runtime.errors import UserError

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # for example IPv6 on a machine without it


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind a port at every address of a host, as asyncio does.

    The sockets do not listen yet, so connections before the model is loaded are refused at once.

    Args:
        host: host name or address.
        port: port number; 0 for a free port, the same at all addresses.

    Raises:
        UserError: if the port is in use or cannot be bound.
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
    except (OSError, OverflowError, UnicodeError) as error:  # includes invalid host names
        for taken in sockets:
            taken.close()
        raise UserError(f"--host {host} --port {port}: {error}") from None
    return sockets


def listen(host: str, sockets: Sequence[socket.socket]) -> str:
    """Start listening on the sockets of `bind` and return the URL.

    Raises:
        UserError: if another process has started to listen on the same port meanwhile.
    """
    port = sockets[0].getsockname()[1]
    try:
        for taken in sockets:
            taken.listen()
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    return url_of(host, port)


def url_of(host: str, port: int) -> str:
    """Return the URL of a host name or address and a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    # asyncio sets TCP_NODELAY only if the protocol is explicit; without it, a response takes 40 ms.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 has its own socket
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(address)
    except BaseException:
        taken.close()
        raise
    return taken

"""The address of the server, known to be free before models and their libraries are loaded."""

from __future__ import annotations

import socket

from tokenflex.errors import ReportedError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; a port of 0 is any free one.

    Raises:
        ReportedError: the address is in use, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ReportedError(f"--host {host} cannot be used: {error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ReportedError(
            f"port {port} of {host} cannot be used: {error.strerror or error}; give another --port"
        ) from None
    return bound

"""The socket of a server."""

from __future__ import annotations

import socket

from evlgen.common.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which takes no connection yet.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        return found
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be served ({error.strerror or error}): choose another with --host "
            "and --port."
        ) from error

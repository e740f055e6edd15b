"""Images at http(s) addresses that requests name: only public ones, within limits.

A name is resolved once, every address it stands for is checked, and the connection goes to one of these, so a
name that changes its meaning in between leads nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from evlgen.common.safe_text import shown_name
from evlgen.serving.errors import Refusal
from evlgen.serving.uploads import MEDIA_TYPES, check_media_type

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PARAM = "messages"
_CHUNK = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LONGEST = 2048  # characters of an address


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and the IPv4 address inside an IPv6 one as well."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(inside)
        if address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class Fetcher:
    """Downloads images.

    Args:
        max_bytes: of an image.
        seconds: for all of a download: resolving, redirections and content.
        max_redirects: followed at most. From https to http none is.
        may_connect: whether an address may be connected to.
    """

    def __init__(
        self,
        max_bytes: int,
        seconds: float = 10.0,
        max_redirects: int = 3,
        may_connect: Callable[[Address], bool] = is_public,
    ) -> None:
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.max_redirects = max_redirects
        self.may_connect = may_connect
        self._tls = ssl.create_default_context()

    async def fetch(self, url: str) -> tuple[bytes, str]:
        """The bytes at an address, and their media type.

        Raises:
            Refusal: an address that may not be connected to, no answer, another status than 200, another type
                than an image's, too many bytes, redirections or seconds.
        """
        try:
            return await asyncio.wait_for(self._follow(url), self.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise _refusal(url, f"it did not come within {self.seconds:g} seconds") from None
        except (OSError, h11.ProtocolError, EOFError, ValueError) as error:
            raise _refusal(url, f"no proper answer came ({type(error).__name__})") from error

    async def _follow(self, url: str) -> tuple[bytes, str]:
        asked = url
        for _ in range(self.max_redirects + 1):
            parts = _parts(asked)
            found = await self._get(asked, parts)
            if isinstance(found, tuple):
                return found
            target = urljoin(asked, found)
            if parts.scheme == "https" and urlsplit(target).scheme != "https":
                raise _refusal(url, "it leads from https to another protocol")
            asked = target
        raise _refusal(url, f"it leads on more than {self.max_redirects} times")

    async def _addresses(self, url: str, host: str, port: int) -> list[str]:
        """Where to connect: all of a name's addresses, each of which may be connected to."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _refusal(url, "its host is not known") from None
        addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
        for address in addresses:
            if not self.may_connect(ipaddress.ip_address(address.partition("%")[0])):
                raise _refusal(url, "its host is not a public address")
        return addresses

    async def _get(self, url: str, parts: SplitResult) -> tuple[bytes, str] | str:
        """The content and its type, or where a redirection leads."""
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        name = parts.hostname or ""
        reader, writer = await self._connect(url, name, port, is_tls)
        try:
            connection = h11.Connection(h11.CLIENT)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            host = f"[{name}]" if ":" in name else name
            headers = [
                ("Host", host if parts.port is None else f"{host}:{port}"),
                ("User-Agent", "evlgen"),
                ("Accept", ", ".join(MEDIA_TYPES)),
                ("Accept-Encoding", "identity"),
                ("Connection", "close"),
            ]
            writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)))
            writer.write(connection.send(h11.EndOfMessage()))
            await writer.drain()
            return await self._read(url, connection, reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                writer.transport.abort()

    async def _connect(
        self, url: str, host: str, port: int, is_tls: bool
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        settings: dict[str, Any] = {"ssl": self._tls, "server_hostname": host} if is_tls else {}
        problem: OSError | None = None
        for address in await self._addresses(url, host, port):
            try:
                return await asyncio.open_connection(address, port, limit=_CHUNK, **settings)
            except OSError as error:
                problem = error
        raise problem or OSError("no address")

    async def _read(
        self, url: str, connection: h11.Connection, reader: asyncio.StreamReader
    ) -> tuple[bytes, str] | str:
        media_type, content = "", bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
                if event.status_code in (301, 302, 303, 307, 308) and headers.get("location"):
                    return headers["location"]
                if event.status_code != 200:
                    raise _refusal(url, f"the answer there has the status {event.status_code}")
                if headers.get("content-encoding", "identity").lower() != "identity":
                    raise _refusal(url, "its content is compressed")
                media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
                check_media_type(media_type)
                self._check_size(url, int(headers.get("content-length", 0)))
            elif isinstance(event, h11.Data):
                content += event.data
                self._check_size(url, len(content))
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content), media_type
            elif isinstance(event, h11.ConnectionClosed):
                raise EOFError

    def _check_size(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            raise _refusal(url, f"it has more than {self.max_bytes:,} bytes")


def _parts(url: str) -> SplitResult:
    """An http(s) address, taken apart. Raises `Refusal` for any other."""
    if len(url) > _LONGEST or not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
        raise _refusal(url, "it is too long, or has characters that an address does not have")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refusal(url, "it is not an address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise _refusal(url, "it is not an http(s) address")
    if parts.username is not None or parts.password is not None:
        raise _refusal(url, "it has a user name or password in it")
    return parts


def _refusal(url: str, why: str) -> Refusal:
    return Refusal(400, f"the image at {shown_name(url)} is not read: {why}.", "image_url_refused", _PARAM)

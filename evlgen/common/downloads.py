"""Fetching a file over http(s): checked against its published sum, and at its place only when it is whole."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import http.client
import logging
import os
import tempfile
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO

from evlgen.common.errors import DataError
from evlgen.common.io import make_readable

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


def fetch(url: str, target: Path, md5: str | None = None) -> Path:
    """Downloads a file to ``target``. Nothing is there, nor left beside it, when that fails.

    Args:
        url: an http(s) address. A redirection from https to http is not followed.
        target: the file's path; one that is there is replaced.
        md5: the published sum of the content, in hexadecimal digits. Sums that the server itself sends are
            compared too.

    Raises:
        DataError: no answer, an HTTP error, a connection that broke off, another sum, or a full disk. Names
            the address and where the file may be put by hand.
    """
    logger.info("downloading %s to %s", url, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file, _opened(url) as answer:
                _copy(answer, file, md5)
                file.flush()
                os.fsync(file.fileno())
            make_readable(temporary)
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except _Refused as error:
        raise DataError(f"{url} was refused: {error}. Nothing was kept.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = str(error).strip() or type(error).__name__
        raise DataError(
            f"{url} could not be downloaded ({cause}). Fetch it on a machine with a connection and put it "
            f"at {target}."
        ) from error
    return target


def file_md5(path: str | os.PathLike) -> str:
    """The md5 sum of a file in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class _Refused(Exception):
    """The content is not what was published."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections within http(s), and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        secure = newurl.lower().startswith("https://")
        if not secure and (req.type == "https" or not newurl.lower().startswith("http://")):
            raise urllib.error.URLError(f"it leads from {req.type} to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opened(url: str) -> http.client.HTTPResponse:
    if not url.startswith(("http://", "https://")):
        raise ValueError("no http(s) address")
    request = urllib.request.Request(url, headers={"User-Agent": "evlgen"})
    return urllib.request.build_opener(_SafeRedirects).open(request, timeout=_TIMEOUT)


def _copy(answer: http.client.HTTPResponse, file: IO[bytes], md5: str | None) -> None:
    """Copies the answer's body, and compares its length and sum with what was announced and published."""
    from tqdm import tqdm

    announced = answer.headers.get("Content-Length", "")
    expected = int(announced) if announced.isascii() and announced.isdigit() else None
    digest, received = hashlib.md5(usedforsecurity=False), 0
    with tqdm(total=expected, unit="B", unit_scale=True, disable=None) as bar:  # None: where nobody looks
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    if expected is not None and received != expected:
        raise OSError(f"the connection broke off after {received} of {expected} bytes")
    found = digest.hexdigest()
    if md5 is not None and found != md5.strip().lower():
        raise _Refused(f"its md5 is {found}, and {md5} was published")
    for sent in _sent_sums(answer.headers):
        if found != sent:
            raise OSError(f"its md5 is {found}, and the server announced {sent}")


def _sent_sums(headers: Message) -> list[str]:
    """The md5 sums that the server sends of the body (RFC 1864; Google Cloud Storage's x-goog-hash)."""
    sums = headers.get_all("Content-MD5") or []
    if headers.get("x-goog-stored-content-encoding", "identity") == "identity":
        parts = ",".join(headers.get_all("x-goog-hash") or []).split(",")
        sums += [part.strip().removeprefix("md5=") for part in parts if part.strip().startswith("md5=")]
    found = []
    for text in sums:
        with contextlib.suppress(binascii.Error, ValueError):
            found.append(base64.b64decode(text, validate=True).hex())
    return [sent for sent in found if len(sent) == 32]

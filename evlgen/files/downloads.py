"""Fetching a file over http(s): continued where it broke off, checked against its published sum, and at its
place only when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from evlgen.common.errors import DataError
from evlgen.files.locks import file_lock
from evlgen.files.partial_file import PartialFile, Version

logger = logging.getLogger(__name__)

# Seconds before each further try after a broken connection or a server's trouble. One that brought bytes
# starts them again.
PAUSES: tuple[float, ...] = (1, 2, 4, 8, 16)
_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_SHORT_TIMEOUT = 10  # where somebody waits for the answer
_PASSING = (408, 425, 429)  # and 5xx: HTTP errors that may be gone at the next try (RFC 9110, 8470, 6585)


def fetch(url: str, target: Path, md5: str | None = None) -> Path:
    """Downloads a file to ``target``, where it appears when it is whole.

    A broken connection is taken up again where it broke off, also by the next call and by the next run: what
    has come is kept beside the target, where it can be told that the file has not changed meanwhile. Another
    process that fetches the same file is waited for.

    Args:
        url: an http(s) address. A redirection from https to http is not followed.
        target: the file's path; one that is there is replaced.
        md5: the published sum of the content, in hexadecimal digits. Sums that the server itself sends are
            compared too.

    Raises:
        DataError: no answer, an HTTP error, a connection that keeps breaking off, another sum (then nothing
            is kept), or no room. Names the address and where the file may be put by hand.
    """
    before, part = _identity(target), PartialFile(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(target):
            if _identity(target) not in (None, before):
                return target  # another process was the first
            try:
                _complete(part, url, md5)
                part.land()
            finally:
                if not (part.size and _may_continue(part.version, url, md5)):
                    part.drop()
    except _Refused as error:
        raise DataError(f"{url} was refused: {error}. Nothing was kept.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = str(error).strip() or type(error).__name__
        kept = f" {as_size(part.size)} of it are kept: try again to go on from there." if part.size else ""
        raise DataError(
            f"{url} could not be downloaded ({cause}).{kept} Fetch it on a machine with a connection and put "
            f"it at {target}."
        ) from error
    return target


def length_of(url: str) -> int | None:
    """Bytes of the file at an address, as its server says; None where it does not say.

    Raises:
        DataError: it is not there, or nobody answers.
    """
    try:
        with _answer(url, method="HEAD", timeout=_SHORT_TIMEOUT) as answer:
            return Version.of(url, answer.headers).length
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url} cannot be asked for its size ({error}).") from error


def file_md5(path: str | os.PathLike) -> str:
    """The md5 sum of a file in hexadecimal digits."""
    return _digest_of(path).hexdigest()


def as_size(size: float) -> str:
    """A number of bytes for people: ``13.5 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class _Refused(Exception):
    """The content is not what was published."""


class _Broken(OSError):
    """The network's or the server's trouble: another try may help."""


class _Unreachable(_Broken):
    """Nobody answers: another try may help where somebody did before."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections within http(s), and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        secure = newurl.lower().startswith("https://")
        if not secure and (req.type == "https" or not newurl.lower().startswith("http://")):
            raise urllib.error.URLError(f"it leads from {req.type} to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _identity(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def _complete(part: PartialFile, url: str, md5: str | None) -> None:
    """Fetches what is missing, trying again as `PAUSES` allow, and checks the whole."""
    start = furthest = part.size
    failures = 0  # since the last try that came further than all before
    while True:
        try:
            return _go_on(part, url, md5)
        except _Broken as error:
            if part.size > furthest:
                failures, furthest = 0, part.size
            is_hopeless = isinstance(error, _Unreachable) and furthest == start
            if is_hopeless or failures >= len(PAUSES):
                raise
            logger.warning("%s: %s. Trying again in %g s.", url, error, PAUSES[failures])
            time.sleep(PAUSES[failures])
            failures += 1


def _may_continue(version: Version | None, url: str, md5: str | None) -> bool:
    """Whether a beginning can be continued without mixing two files: the server can be asked for the rest of
    just that one, or the published sum will tell."""
    return version is not None and version.url == url and bool(version.mark or md5)


def _go_on(part: PartialFile, url: str, md5: str | None) -> None:
    """One connection: takes what is missing, or what comes of it; then the sums are compared."""
    if not _may_continue(part.version, url, md5):
        part.drop()
    begun, digest = part.version if part.size else None, _digest_of(part.path)
    if begun is None or part.size != begun.length:  # else only its last step was missing
        begun, digest = _receive(part, url, begun, digest)
    found = digest.hexdigest()
    if md5 is not None and found != md5.strip().lower():
        part.drop()
        raise _Refused(f"its md5 is {found}, and {md5} was published")
    for sent in begun.md5:
        if found != sent:
            part.drop()
            raise OSError(f"its md5 is {found}, and the server announced {sent}")


def _receive(
    part: PartialFile, url: str, begun: Version | None, digest: hashlib._Hash
) -> tuple[Version, hashlib._Hash]:
    """Appends the rest, or begins again with an answer that holds the whole. Returns what file it is, and its
    digest."""
    try:
        answer = _answer(url, _asking_for_rest(begun, part.size) if begun else {})
    except urllib.error.HTTPError as error:
        if begun and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.drop()
            raise _Broken("the file changed on the server during the download") from error
        raise
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            begun, digest = Version.of(url, answer.headers), hashlib.md5(usedforsecurity=False)
            part.begin(begun)
        elif begun is None or not _is_rest(answer, begun, part.size):
            part.drop()
            raise _Broken("the file changed on the server during the download")
        _check_room(part.path.parent, begun.length, part.size)
        if _takes_a_while(begun.length):
            logger.info("downloading %s to %s", url, part.target)
        with open(part.path, "ab") as file:
            _append(answer, file, digest, begun.length)
    return begun, digest


def _asking_for_rest(begun: Version, size: int) -> dict[str, str]:
    """The headers that ask for the rest of this version, and for the whole where there is another one."""
    return {"Range": f"bytes={size}-"} | ({"If-Range": begun.mark} if begun.mark else {})


def _is_rest(answer: http.client.HTTPResponse, begun: Version, size: int) -> bool:
    """Whether a partial answer starts where we are, in the file we have the beginning of."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    if found is None or int(found[1]) != size:
        return False
    now = Version.of(begun.url, answer.headers)
    is_same = found[2] == "*" or begun.length is None or int(found[2]) == begun.length
    # some servers heed Range and not If-Range
    return is_same and now.etag in (None, begun.etag) and now.modified in (None, begun.modified)


def _answer(
    url: str, headers: dict[str, str] | None = None, method: str = "GET", timeout: float = _TIMEOUT
) -> http.client.HTTPResponse:
    if not url.startswith(("http://", "https://")):
        raise ValueError("no http(s) address")
    request = urllib.request.Request(url, headers={"User-Agent": "evlgen", **(headers or {})}, method=method)
    try:
        return urllib.request.build_opener(_SafeRedirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code in _PASSING or error.code >= 500:
            raise _Broken(str(error)) from error
        raise
    except urllib.error.URLError as error:
        raise _Unreachable(str(error.reason)) from error
    except (http.client.BadStatusLine, ConnectionError, TimeoutError) as error:
        raise _Broken(f"no proper answer came: {error}") from error


def _append(
    answer: http.client.HTTPResponse, file: IO[bytes], digest: hashlib._Hash, length: int | None
) -> None:
    """Adds the answer's body to what is there; ``length`` is that of the whole file."""
    from tqdm import tqdm

    size = file.tell()
    hidden = None if _takes_a_while(length) else True  # None: where nobody looks
    with tqdm(total=length, initial=size, unit="B", unit_scale=True, disable=hidden) as bar:
        while chunk := _chunk(answer):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    file.flush()
    os.fsync(file.fileno())
    if length is not None and size != length:
        raise _Broken(f"the connection broke off after {size} of {length} bytes")


def _takes_a_while(length: int | None) -> bool:
    """Whether a file of this length is worth a line and a bar; one of thousands of images is not."""
    return length is None or length > 8 * _CHUNK


def _chunk(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke off: {str(error) or type(error).__name__}") from error


def _check_room(folder: Path, length: int | None, size: int) -> None:
    missing, free = (length or 0) - size, shutil.disk_usage(folder).free
    if missing > free:
        raise DataError(
            f"{as_size(missing)} are still to come and {as_size(free)} are free at {folder}: make room "
            "there, or choose another place (EVLGEN_CACHE).",
            "disk full",
        )


def _digest_of(path: str | os.PathLike) -> hashlib._Hash:
    """The md5 digest of a file's content; of nothing where it is not there."""
    digest = hashlib.md5(usedforsecurity=False)
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest

"""What has come of a download: kept beside its place, with what is known of the whole, to be continued."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import json
import os
from email.message import Message
from pathlib import Path
from typing import Any

from evlgen.files.atomic import make_readable, write_atomically


@dataclasses.dataclass(frozen=True)
class Version:
    """What a server says of a file: the same answers mean the same bytes.

    Attributes:
        url: the address it was asked for by.
        etag: the file's mark, where it is a strong one (RFC 9110, section 8.8.1: the same bytes).
        modified: the date of its last change, as the server writes it.
        length: bytes of the whole file.
        md5: the sums of the whole file that the server sends, in hexadecimal digits.
    """

    url: str
    etag: str | None = None
    modified: str | None = None
    length: int | None = None
    md5: tuple[str, ...] = ()

    @classmethod
    def of(cls, url: str, headers: Message) -> Version:
        """From the headers of an answer that holds the whole file."""
        etag, length = headers.get("ETag"), headers.get("Content-Length", "")
        return cls(
            url=url,
            etag=etag if etag and not etag.startswith("W/") else None,
            modified=headers.get("Last-Modified"),
            length=int(length) if length.isascii() and length.isdigit() else None,
            md5=tuple(_sent_sums(headers)),
        )

    @property
    def mark(self) -> str | None:
        """What ``If-Range`` names (RFC 9110, section 13.1.5); None: a change would go unseen."""
        return self.etag or self.modified


class PartialFile:
    """The beginning of a file, until it is whole.

    Args:
        target: the file's place. The beginning is at ``.name.part`` beside it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self._record = target.with_name(f".{target.name}.part.json")

    @property
    def size(self) -> int:
        """Bytes so far."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self.path.stat().st_size
        return 0

    @property
    def version(self) -> Version | None:
        """What it is the beginning of; None where that is not known."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            content: dict[str, Any] = json.loads(self._record.read_text("utf-8"))
            return Version(**{**content, "md5": tuple(content["md5"])})
        return None

    def begin(self, version: Version) -> None:
        """Starts again with a file of which this is known."""
        self.drop()
        write_atomically(self._record, json.dumps(dataclasses.asdict(version)))

    def drop(self) -> None:
        """Removes it."""
        for path in (self.path, self._record):
            path.unlink(missing_ok=True)

    def land(self) -> None:
        """Puts it at its place: it is whole."""
        make_readable(self.path)
        os.replace(self.path, self.target)
        self._record.unlink(missing_ok=True)


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

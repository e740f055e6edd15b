"""Captions of large folders in one file: each image once, by several processes, going on after a kill.

While the work is going on, ``<output>.partial/`` holds what is done: ``settings.json``, and for each process
``rank-<r>.jsonl``, to which it appends its captions and failures batch by batch. An image belongs to the
process that its path says, so that processes need not speak with each other. Whichever of them finds that all
is done joins the parts, in the order of the listing, into the output, and removes the folder. The settings
stay, in ``.<output>.settings.json``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from evlgen.captioning import default_device, reads_videos, write_captions
from evlgen.common.errors import ConfigError, DataError, TrainingError
from evlgen.config.consent import Consent
from evlgen.files.io import atomic_file, write_atomically
from evlgen.files.locks import file_lock, try_lock_file
from evlgen.media.frames import find_files
from evlgen.models.zoo import load_model_of

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"


def caption_to_file(
    images: Sequence[str],
    output: str | Path,
    cfg_path: str | None = None,
    checkpoint: str | None = None,
    options: Sequence[str] = (),
    batch_size: int = 16,
    allow_downloads: bool | Consent = False,
    rank: int = 0,
    world_size: int = 1,
    **how: Any,
) -> tuple[int, int] | None:
    """Writes ``{"image": path, "caption": text}`` for each image to a JSONL file, in the order of
    `media.frames.find_files`, and ``{"image": path, "error": why, "cause": kind}`` for each that cannot be
    read to ``<output>.failed``.

    A call after a killed one goes on from its last batch. One after a finished one captions the images that
    are new since, with the same settings; delete ``<output>.failed`` to have the failed ones tried again.

    Args:
        images, cfg_path, checkpoint, options, batch_size, allow_downloads: as in `captioning.caption_files`.
        how: ``prompt``, ``num_beams``, ``max_length`` and ``num_frames``, likewise.
        rank, world_size: which of how many processes this is.

    Returns:
        The numbers of captions and of failures; None where other processes are still at work, one of which
        will finish the file.

    Raises:
        ConfigError: the work was begun, or finished, with other settings; ``output`` is another kind of file.
        TrainingError: another process is this rank of the same work.
        DataError: not one image could be read.
    """
    output = Path(output)
    folder = output.with_name(f"{output.name}.partial")
    settings = {"cfg_path": cfg_path, "checkpoint": checkpoint, "options": list(options), **how}
    if _finished(output) and output.exists():
        _check_settings(_settings_of(output), settings, output)
    folder.mkdir(parents=True, exist_ok=True)
    if not _check_settings(folder / _SETTINGS, settings, folder):
        write_atomically(folder / _SETTINGS, json.dumps(settings))
    with _own_part(folder / f"rank-{rank:05d}.jsonl") as part:
        model = load_model_of(cfg_path, checkpoint, options, default_device(), allow_downloads)
        paths = list(dict.fromkeys(find_files(images, videos=reads_videos(model))))
        done = _finished(output) | _parts(folder)
        mine = [p for p in paths if p not in done and _owner(p, world_size) == rank]
        num_done = sum(path in done for path in paths)
        logger.info(
            "%d images, of which %d are done; this process captions %d", len(paths), num_done, len(mine)
        )
        failed: list[dict[str, str]] = []

        def note(path: str, error: DataError) -> None:
            failed.append({"image": path, "error": str(error), "cause": error.cause})

        for batch in write_captions(model, mine, batch_size=batch_size, on_error=note, **how):
            _append(part, [*({"image": path, "caption": text} for path, text in batch), *failed])
            failed.clear()
        _append(part, failed)
    with file_lock(folder):  # the last one finds everything done
        return _join(output, folder, paths)


def _owner(path: str, world_size: int) -> int:
    """The process that captions a file, whatever else is in the folder."""
    return zlib.crc32(os.fsencode(path)) % world_size


def _check_settings(file: Path, settings: Mapping[str, Any], of: Path) -> bool:
    """Whether there is a file of settings. Raises `ConfigError` where they are others than these."""
    try:
        before = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return False
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        was = ", ".join(f"{key}={before.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{of} was begun with other settings ({was}): go on with those, delete it to begin again, or "
            "name another --output."
        )
    return True


@contextlib.contextmanager
def _own_part(path: Path) -> Iterator[BinaryIO]:
    """The file of this process, open for appending: a line that a killed process left unfinished is cut."""
    with open(path, "ab+") as file:
        if not try_lock_file(file):
            raise TrainingError(
                f"{path} is being written by another process: to share the work of one output, start the "
                "processes with torchrun."
            )
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        yield file


def _append(file: BinaryIO, lines: Sequence[Mapping[str, str]]) -> None:
    file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    file.flush()


def _lines(path: Path) -> Iterator[dict[str, str]]:
    """The whole lines of a JSONL file. Raises `ConfigError` for one that this module did not write."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                continue
            try:
                found = json.loads(line)
                is_ours = isinstance(found["image"], str) and ("caption" in found or "error" in found)
            except (ValueError, KeyError, TypeError):
                is_ours = False
            if not is_ours:
                raise ConfigError(
                    f"{path} is there, and its line {number} is not one of this command's: name another "
                    "--output, or move it away."
                )
            yield found


def _settings_of(output: Path) -> Path:
    """With which settings it was written."""
    return output.with_name(f".{output.name}.{_SETTINGS}")


def _failed(output: Path) -> Path:
    """Where the failures are listed."""
    return output.with_name(f"{output.name}.failed")


def _finished(output: Path) -> dict[str, dict[str, str]]:
    """What an earlier call has finished, by image."""
    return {line["image"]: line for file in (output, _failed(output)) for line in _lines(file)}


def _parts(folder: Path) -> dict[str, dict[str, str]]:
    """What all processes have done so far, by image."""
    return {line["image"]: line for part in sorted(folder.glob("rank-*.jsonl")) for line in _lines(part)}


def _join(output: Path, folder: Path, paths: Sequence[str]) -> tuple[int, int] | None:
    """Writes the output where everything is done; None where something is not, or another has written it."""
    done = _finished(output) | _parts(folder)
    if not folder.is_dir():
        return None
    if any(path not in done for path in paths):
        return None
    found = [done[path] for path in paths]
    captions, failures = ([line for line in found if key in line] for key in ("caption", "error"))
    if failures:
        _write(_failed(output), failures)
    else:
        _failed(output).unlink(missing_ok=True)
    os.replace(folder / _SETTINGS, _settings_of(output))
    _write(output, captions)
    shutil.rmtree(folder)
    if not captions:
        raise DataError(f"none of the {len(paths)} files could be captioned: {_failed(output)} says why.")
    return len(captions), len(failures)


def _write(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    with atomic_file(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

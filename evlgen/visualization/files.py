"""Figures of merging for image and video files: what ``python -m evlgen visualize`` does."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from evlgen.common.errors import DataError
from evlgen.config.config import Config
from evlgen.config.consent import Consent
from evlgen.config.run_config import RunConfig
from evlgen.config.yaml_io import read_yaml
from evlgen.files.io import resolve, write_atomically
from evlgen.media.frames import find_files, read_files, without_result
from evlgen.models.zoo import load_model_of
from evlgen.visualization.figure import draw_found, merge_videos, untrained
from evlgen.weights.checkpoints import CONFIG_FILE


def visualize_files(
    images: Sequence[str],
    output: str = "merging.png",
    cfg_path: str | None = None,
    checkpoint: str | None = None,
    options: Sequence[str] = (),
    layers: str = "all",
    compare_untrained: bool = False,
    seed: int | None = None,
    num_frames: int = 4,
    left_out: list[str] | None = None,
    allow_downloads: bool | Consent = False,
) -> list[Path]:
    """Draws merging and writes PNG files; what cannot be read is named in a warning and left out.

    Args:
        images: image or video files, addresses, or folders of them, which are walked.
        output: a file for one sheet, or a folder (a name without a suffix is one) for a sheet each.
        cfg_path, checkpoint, options: the model, as in `captioning.caption_files`.
        layers: see `merging.find_merging`.
        compare_untrained: also what the model's training started from, see `figure.untrained`.
        seed: of that; None for the project's.
        num_frames: of each video at most.
        left_out: a list to which those of ``images`` are added that could not be drawn.
        allow_downloads: see `BaseModel.from_pretrained`.

    Returns:
        The files written.

    Raises:
        ConfigError: the model merges nothing, or ``layers`` names none of its layers.
        DataError: not one file could be read, or ``output`` takes no files.
    """
    targets = _Targets(output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = find_files(images, videos=True)
    read = list(read_files(paths, num_frames))
    if not read:
        raise DataError(f"none of the {len(paths)} files could be read as an image or a video.")
    if left_out is not None:
        left_out += without_result(images, {path for path, _ in read}, videos=True)
    seed = _seed(cfg_path, checkpoint, options) if seed is None else seed
    torch.manual_seed(seed)  # an encoder without pretrained weights is then the same in both
    model = load_model_of(cfg_path, checkpoint, options, device, allow_downloads)
    videos = [video for _, video in read]
    found = {"trained" if compare_untrained else "": merge_videos(model, videos, layers)}
    if compare_untrained:
        found["untrained"] = merge_videos(untrained(model, seed), videos, layers)
    names = [Path(path).name for path, _ in read]
    if not targets.is_folder:
        return [targets.write(draw_found(found, names), "")]
    parts = ({title: [videos[i]] for title, videos in found.items()} for i in range(len(read)))
    sheets = (draw_found(part, [name]) for part, name in zip(parts, names, strict=True))
    return [targets.write(sheet, Path(name).stem) for sheet, name in zip(sheets, names, strict=True)]


class _Targets:
    """Where sheets are written."""

    def __init__(self, output: str) -> None:
        self.path = Path(output).expanduser()
        self.is_folder = self.path.is_dir() or output.endswith(os.sep) or not self.path.suffix
        self._written: set[str] = set()
        if not self.is_folder and self.path.suffix.lower() != ".png":
            raise DataError(f"--output {output}: sheets are PNG files. Name one, or a folder.")

    def write(self, sheet: Image.Image, stem: str) -> Path:
        """Writes a sheet; files of one name in different folders get numbers."""
        path = self.path
        if self.is_folder:
            name, number = stem, 1
            while name in self._written:
                number += 1
                name = f"{stem}-{number}"
            self._written.add(name)
            path = self.path / f"{name}.png"
        data = io.BytesIO()
        sheet.save(data, format="PNG", optimize=True)
        try:
            write_atomically(path, data.getvalue())
        except OSError as error:
            raise DataError(f"cannot write {path}: {os.strerror(error.errno or 0)}.") from error
        return path


def _seed(cfg_path: str | None, checkpoint: str | None, options: Sequence[str]) -> int:
    """The seed of the run that trained a model, where that is known; else the default one."""
    if cfg_path is not None:
        return Config.load(cfg_path, options).run.seed
    folder = Path(resolve(checkpoint or ""))
    run = read_yaml(folder / CONFIG_FILE).get("run") if (folder / CONFIG_FILE).is_file() else None
    seed = run.get("seed") if isinstance(run, dict) else None
    return seed if isinstance(seed, int) else RunConfig().seed

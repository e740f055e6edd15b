"""From JPEG files to normalised tensors: images per second of one core against Pillow alone, and of several
workers.

``python benchmarks/loader.py [--workers] [--images 40] [--rounds 9] [--folder DIR]``
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import Side
from PIL import Image

from evlgen.datasets.base_dataset import BaseDataset
from evlgen.loaders import data
from evlgen.loaders.data import BatchPlan, train_loader
from evlgen.media.images import open_image
from evlgen.processors import build_processor

SIZE, TARGET = (640, 480), 224
BATCH, NEEDED = 64, 400  # images a second that a training step on a fast card reads
SETTINGS = {
    "as published": {},
    "draft: true": {"draft": True},
    "resize: torch": {"resize": "torch"},
    "both": {"resize": "torch", "draft": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", "--pictures", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="JPEG photographs to take, brought to 640x480")
    parser.add_argument("--workers", action="store_true", help="whole loaders of several workers instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), args.images, args.folder)
        kib = statistics.mean(os.path.getsize(path) for path in paths) / 1024
        print(f"{len(paths)} JPEG files of {SIZE[0]}x{SIZE[1]}, {kib:.0f} KiB on average, one thread")
        if args.workers:
            compare_workers(paths, args.rounds)
            return
        for name in ("blip_image_eval", "blip2_image_train"):
            compare_processors(name, paths, args.rounds)
        measure_parts(paths, args.rounds)


def compare_processors(name: str, paths: Sequence[Path], rounds: int) -> None:
    """A processor's settings against Pillow's decoding and resizing of the same files, in turn."""
    calls: dict[str, Callable[[Path], object]] = {"Pillow alone": bare}
    for label, settings in SETTINGS.items():
        processor = build_processor({"name": name, "image_size": TARGET, **settings})
        calls[label] = lambda path, p=processor: p(open_image(path, p.draft_size))
    sides = {label: Side(label) for label in calls}
    for number in range(1 + rounds):
        for label in calls if number % 2 else reversed(calls):
            torch.manual_seed(number)
            started = time.process_time()  # of this process: what else the machine does is not in it
            for path in paths:
                calls[label](path)
            if number:
                sides[label].seconds.append((time.process_time() - started) / len(paths))
    print(f"{name}: milliseconds of processor time an image; images per second against Pillow's")
    base = sides["Pillow alone"].seconds
    for label, side in sides.items():
        pairs = sorted(b / s for b, s in zip(base, side.seconds, strict=True))
        ratio = statistics.median(pairs)
        changed = "" if label == "Pillow alone" else difference(name, SETTINGS[label], paths)
        took = f"{1e3 * side.median:5.2f} ms  {ratio:.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})"
        print(f"  {label:<14} {took}{changed}", flush=True)


def measure_parts(paths: Sequence[Path], rounds: int) -> None:
    """Where a training image's time goes, and how many cores the need of a fast card takes."""
    processor = build_processor({"name": "blip2_image_train", "image_size": TARGET})
    parts: dict[str, list[float]] = {"decode": [], "crop and resize": [], "to a tensor": [], "batch": []}
    for number in range(1 + rounds):
        torch.manual_seed(number)
        marks = [time.process_time()]
        images = [open_image(path).convert("RGB") for path in paths]
        marks.append(time.process_time())
        cut = [processor.transform(image) for image in images]
        marks.append(time.process_time())
        tensors = [processor._normalise(torch.from_numpy(np.array(c)).permute(2, 0, 1)) for c in cut]
        marks.append(time.process_time())
        batch = shared_batch([tensors[i % len(tensors)] for i in range(BATCH)])
        marks.append(time.process_time())
        counts = (*[len(paths)] * 3, len(batch))
        for name, start, end, count in zip(parts, marks, marks[1:], counts, strict=False):
            if number:
                parts[name].append((end - start) / count)
    medians = {name: statistics.median(seconds) for name, seconds in parts.items()}
    each = sum(medians.values())
    print(
        "blip2_image_train, part by part: " + ", ".join(f"{n} {1e3 * s:.2f} ms" for n, s in medians.items())
    )
    print(f"{1 / each:.0f} images a second and core: {NEEDED} a second take {NEEDED * each:.1f} cores")


def shared_batch(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A batch in memory that other processes read, as a loader's process makes it."""
    storage = tensors[0].untyped_storage()._new_shared(sum(t.nbytes for t in tensors))
    out = torch.empty(0).set_(storage, 0, (len(tensors), *tensors[0].shape))
    return torch.stack(tensors, out=out)


def bare(path: Path) -> Image.Image:
    """What has to be done at least, were the tensor for nothing."""
    with Image.open(path) as image:
        return image.convert("RGB").resize((TARGET, TARGET), Image.Resampling.BICUBIC)


def difference(name: str, settings: dict, paths: Sequence[Path]) -> str:
    """How far pixels are from the published ones, of 255."""
    if not settings:
        return ""
    section = {"name": name, "image_size": TARGET, "mean": (0, 0, 0), "std": (1, 1, 1)}
    published, other = build_processor(section), build_processor({**section, **settings})
    apart = []
    for path in paths:
        pixels = []
        for processor in (published, other):
            torch.manual_seed(0)
            pixels.append(processor(open_image(path, processor.draft_size)))
        if name == "blip_image_eval" or "draft" not in settings:  # else parts are drawn of another size
            apart.append(255 * (pixels[0] - pixels[1]).abs())
    if not apart:
        return ""
    mean, most = torch.stack(apart).mean(), torch.stack(apart).max()
    return f"   pixels differ by {mean:.2f} of 255, at most {most:.0f}"


class ImageFiles(BaseDataset):
    """Files as training reads them."""

    def load_sample(self, index: int) -> dict:
        return {"image": self.vis_processor(open_image(self.records[index]))}


def compare_workers(paths: Sequence[Path], rounds: int, batch: int = 16, batches: int = 16) -> None:
    """Images per second of a loader with several workers, in turn; beyond the number of cores with and
    without our limit."""
    dataset = ImageFiles(list(paths), build_processor({"name": "blip2_image_train", "image_size": TARGET}))
    cores = data._workers(64)
    cases = {f"{n} workers": (n, True) for n in (1, 2, 4)} | {"4, all started": (4, False)}
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    limited, found = data._workers, {label: [] for label in cases}
    for _ in range(rounds):
        for label, (workers, is_limited) in cases.items():
            data._workers = limited if is_limited else lambda wanted, batches=None: wanted
            loader = iter(train_loader({"x": dataset}, BatchPlan([len(paths)], batch, 0), workers, False))
            for _ in range(4):
                next(loader)  # workers are started
            started = time.perf_counter()
            for _ in range(batches):
                next(loader)
            found[label].append(batch * batches / (time.perf_counter() - started))
            del loader
    data._workers = limited
    print(f"a training loader on {cores} cores: images per second, and against one worker")
    for label, values in found.items():
        ratio = statistics.median(v / one for v, one in zip(values, found["1 workers"], strict=True))
        print(f"  {label:<15} {statistics.median(values):5.0f}  {ratio:.2f}")


def write_images(folder: Path, count: int, photographs: Path | None) -> list[Path]:
    """JPEG files of 640x480: of photographs where some are given, else of smooth noise with grain."""
    sources = sorted(photographs.rglob("*.jpg")) if photographs else []
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        if sources:
            image = open_image(sources[index % len(sources)])
        else:
            blobs = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            smooth = np.asarray(blobs.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
            image = Image.fromarray((smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        image.resize(SIZE, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        paths.append(folder / f"{index:04d}.jpg")
        paths[-1].write_bytes(file.getvalue())
    return paths


if __name__ == "__main__":
    main()

"""Training from kept visual tokens against training from pixels: samples/s and epochs per hour.

    python benchmarks/vision_cache.py [shapes | textbook] [--precision fp32|bf16] [--rounds 5]

``shapes``: the bundled model at the Shapes project's batch of 64. ``textbook``: ViT 384 x 12 at 224/14 px
(257 tokens), BERT-base TomeFormer with r = 19, OPT-125m's shape, batch 4, random weights. The images are
those of the Shapes world, and both ways do the same steps with the same optimizer, in turn. A step is all a
run does: reading, encoding, loss, backward, optimizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Comparison, compare
from omegaconf import OmegaConf

from evlgen.common.logs import quiet_libraries
from evlgen.common.registry import registry
from evlgen.config.run_config import RunConfig
from evlgen.datasets.shapes_dataset import ShapesCaptionDataset
from evlgen.files.io import PACKAGE_ROOT
from evlgen.loaders.data import BatchPlan, to_device, train_loader
from evlgen.processors import build_processor
from evlgen.runners.distribution import make_accelerator
from evlgen.runners.optimizer import build_optimizer
from evlgen.vision_cache.cache import cached, shown_bytes
from evlgen.vision_cache.store import store_bytes

EPOCH = 20_000  # images of the Shapes project
# batch, images to encode for this benchmark, steps in a round, pixels
SETTINGS = {"shapes": (64, 2048, 8, 64), "textbook": (4, 64, 2, 224)}
ALLOWED = 2e-2  # share by which kept tokens may differ: they are rounded to bf16


def shapes_section(precision: str) -> dict[str, Any]:
    """The bundled model with an untrained connector."""
    section = OmegaConf.load(PACKAGE_ROOT / "configs/models/evlgen_opt/shapes.yaml").model
    return {**with_precision(OmegaConf.to_container(section), precision), "checkpoint": None}


def textbook_section(folder: Path, precision: str) -> dict[str, Any]:
    """Sizes of the textbook step; OPT's random weights are written to the folder."""
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    bundled = PACKAGE_ROOT / "assets/shapes/language"
    AutoModelForCausalLM.from_config(OPTConfig()).save_pretrained(folder)  # OPTConfig() is OPT-125m's
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder / name)
    section = {
        "vision": {
            "name": "vit_small_patch16_224",
            "image_size": 224,
            "pretrained": False,
            "kwargs": {"patch_size": 14},
        },
        "connector": {"name": "tomeformer", "num_layers": 12, "r": 19},
        "language": {"name": str(folder)},
    }
    return with_precision({"arch": "evlgen_opt", **section}, precision)


def with_precision(section: dict[str, Any], precision: str) -> dict[str, Any]:
    """The section with its frozen parts in a precision."""
    for part in ("vision", "language"):
        section[part]["precision"] = precision
    return section


def measure(what: str, precision: str, rounds: int, folder: Path) -> None:
    """Fills a cache, runs both ways in turn and prints what came of it."""
    batch, images, steps, side = SETTINGS[what]
    settings = {"precision": precision, "batch_size_train": batch, "batch_size_eval": batch, "num_workers": 0}
    run = RunConfig(max_epoch=1, cache_vision=True, **settings)
    accelerator = make_accelerator(run)
    section = shapes_section(precision) if what == "shapes" else textbook_section(folder / "opt", precision)
    torch.manual_seed(0)
    model = registry.get_model_class("evlgen_opt").from_config(section, accelerator.device)
    model.to(accelerator.device)
    image = build_processor({"name": "blip_image_eval", "image_size": side, **pixel_range(model)})
    dataset = ShapesCaptionDataset("train", images, 0, image, build_processor({"name": "blip_caption"}))
    started = time.perf_counter()
    kept = cached({"shapes": dataset}, model, run, accelerator)["shapes"]
    filling = time.perf_counter() - started

    model.train()
    optimizer = build_optimizer(model, 1e-5, 0.05, 0.999)
    batches = {
        name: iter(train_loader({"shapes": data}, BatchPlan([images], batch, 0), 0, pin_memory=False))
        for name, data in (("tokens", kept), ("pixels", dataset))
    }

    def step(name: str) -> None:
        samples = to_device(next(batches[name]), accelerator.device)
        samples.pop("skipped")
        with accelerator.autocast():
            loss = model(samples)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    check_equal_work(model, next(batches["tokens"]), next(batches["pixels"]))
    print(f"{what}, {precision}, {torch.get_num_threads()} threads; an epoch is {EPOCH} images")
    ways = [partial(several, step, name, steps) for name in ("tokens", "pixels")]
    found = compare(*ways, rounds, 1, tolerance=None, names=("from tokens", "from pixels")).show()
    report(batch * steps, found, filling / images)
    size = store_bytes(EPOCH, 1, kept.store.shape)
    print(f"  {kept.store.shape[0]} tokens x {kept.store.shape[1]}: {shown_bytes(size)} for {EPOCH} images")


def pixel_range(model: Any) -> dict[str, list[float]]:
    return {"mean": list(model.vision.image_mean), "std": list(model.vision.image_std)}


@torch.no_grad()
def check_equal_work(model: Any, kept: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Refuses to compare ways whose batches do not hold the same images and texts."""
    tokens = model.encode(pixels["image"]).float()
    apart = (kept["visual_tokens"].to(tokens) - tokens).norm() / tokens.norm()
    if not apart < ALLOWED or kept["text_input"] != pixels["text_input"]:
        raise SystemExit(f"the kept tokens are not those of the same images ({apart:.3f} apart): no figure")


def several(step: Callable[[str], None], name: str, steps: int) -> None:
    """So many steps in a row."""
    for _ in range(steps):
        step(name)


def report(samples: int, found: Comparison, fill_seconds: float) -> None:
    """Prints epochs per hour, and after how many epochs filling has paid."""
    seconds = {side.name: side.median / samples for side in (found.ours, found.other)}  # per sample
    for name, one in seconds.items():
        print(f"  {name}: {1 / one:.1f} samples/s, {3600 / one / EPOCH:.2f} epochs/h")
    saved = seconds["from pixels"] - seconds["from tokens"]
    print(
        f"  filling, once: {1 / fill_seconds:.1f} images/s, {EPOCH * fill_seconds / 60:.1f} minutes; "
        f"paid back after {fill_seconds / saved:.1f} epochs"
    )


@contextmanager
def data_root():
    """A folder of its own as data root."""
    before = os.environ.get("EVLGEN_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EVLGEN_CACHE"] = folder
        yield Path(folder)
    if before is None:
        del os.environ["EVLGEN_CACHE"]
    else:
        os.environ["EVLGEN_CACHE"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=[[], *SETTINGS], help="default: both")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet_libraries()
    for what in args.what or SETTINGS:
        for precision in args.precision or ("fp32", "bf16"):
            with data_root() as folder:
                measure(what, precision, args.rounds, folder)


if __name__ == "__main__":
    main()

"""Captions in COCO's layout: files damaged, and records with values of every kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from evlgen.common.registry import registry
from evlgen.config.yaml_io import read_yaml
from evlgen.files.io import PACKAGE_ROOT
from evlgen.tasks.metrics.ptb_tokenizer import tokenize_lines
from fuzzing.mutate import mutate_json

IMAGES = [f"val2014/COCO_val2014_{number:012}.jpg" for number in (7, 42, 391895)]
_CAPTIONS = ("A red bus.", "Two dogs; one cat!", "la\u0301 caf\u00e9 \u201cau lait\u201d", "$x_{$ 5%", "")
TRAIN = [
    {"image": image, "caption": text, "image_id": f"coco_{i}"}
    for i, image in enumerate(IMAGES)
    for text in _CAPTIONS
]
VAL = [{"image": image, "caption": list(_CAPTIONS)} for image in IMAGES]
TRUTH = {
    "annotations": [
        {"image_id": n, "caption": t, "id": i} for i, n in enumerate((7, 42, 391895)) for t in _CAPTIONS
    ],
    "images": [],
}
_SPLITS = {"train": TRAIN, "val": VAL, "truth": TRUTH}

_texts = (
    st.sampled_from([*IMAGES, *_CAPTIONS, "../x.jpg", "/etc/passwd", "a\0b", "\ud800", "x" * 5000])
    | st.sampled_from(["\n\r\u2028", "/dev/zero"]) | st.text(max_size=40) | st.characters(codec=None).map(str)
    | st.text("0123456789", max_size=40).map(lambda d: f"{d}.jpg")
)  # fmt: skip
_scalars = (
    st.none() | st.booleans() | st.floats() | st.integers() | _texts | st.integers().map(lambda n: n**40)
)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=15,
)
_images = st.sampled_from(IMAGES) | _texts | _json
_records = st.fixed_dictionaries(
    {},
    optional={
        "image": _images,
        "caption": _texts | st.lists(_texts, max_size=4) | _json,
        "image_id": _json | st.integers(0, 3),
    },
)
_image_entries = st.fixed_dictionaries(
    {}, optional={"id": st.integers(0, 3) | _json, "file_name": _images, "domain": _json}
)
_annotations = st.lists(_records, max_size=6) | _json
_good = st.builds(lambda i, t: {"image": i, "caption": t}, st.sampled_from(IMAGES), _texts)
_structured = (
    st.lists(_good | _records, max_size=6) | st.lists(_good, min_size=1, max_size=6) | _json
    | st.fixed_dictionaries({"annotations": _annotations})
    | st.fixed_dictionaries({"images": st.lists(_image_entries)}, optional={"annotations": _annotations})
)  # fmt: skip

inputs = st.tuples(
    st.sampled_from(sorted(_SPLITS)), st.integers(0, 2**32).map(random.Random) | _structured
)  # fmt: skip


def prepare(folder: Path) -> None:
    """A data root with three images and whole annotations."""
    for image in IMAGES:
        path = folder / "coco/images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), "red").save(path)
    for name, content in _SPLITS.items():
        _write(folder, name, json.dumps(content).encode())


def action(folder: Path, drawn: tuple, keep: Callable[[Path], None]) -> Callable[[], object]:
    """What is done with one input: both splits built, samples read, batched, and their captions tokenised."""
    name, source = drawn
    if isinstance(source, random.Random):
        content = mutate_json(json.dumps(_SPLITS[name], ensure_ascii=source.random() < 0.5).encode(), source)
    else:
        content = json.dumps(source, ensure_ascii=True).encode()
    path = _write(folder, name, content)
    keep(path)

    def read() -> None:
        try:
            builder = _builder(folder)
            for split in ("train", "val"):
                dataset = builder.get_split(split)
                batch = dataset.collater([dataset[i] for i in range(min(4, len(dataset)))])
                assert len(batch["skipped"]) <= 4
                dataset.domains()
                json.dumps([dataset.sample_id(i) for i in range(len(dataset))]).encode()
                for captions in list(dataset.references().values())[:10]:
                    assert all(isinstance(caption, str) for caption in captions)
                    "".join(captions).encode()
                    tokenize_lines(captions)
        finally:
            _write(folder, name, json.dumps(_SPLITS[name]).encode())

    return read


def _write(folder: Path, name: str, content: bytes) -> Path:
    place = (
        "coco_gt/coco_karpathy_val_gt.json"
        if name == "truth"
        else f"coco/annotations/coco_karpathy_{name}.json"
    )
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _builder(folder: Path):
    cls = registry.get_builder_class("coco_caption")
    section = read_yaml(PACKAGE_ROOT / cls.DEFAULT_CONFIG)["datasets"]["coco_caption"]
    for processor in section["vis_processor"].values():
        processor["image_size"] = 16
    return cls(name="coco_caption", cache_root=folder, **section)

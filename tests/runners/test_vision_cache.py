"""The vision cache: the same training from kept tokens, a key for all they follow from, and no half work."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from PIL import Image

from evlgen.assemble import run as run_project
from evlgen.common.errors import ConfigError, DataError, Interrupted, TrainingError
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BadRecord, BaseDataset, Skipped
from evlgen.datasets.caption_dataset import CaptionDataset
from evlgen.datasets.media import ImageFiles
from evlgen.datasets.shapes_dataset import ShapesCaptionDataset
from evlgen.loaders.batch_plan import mix_seed
from evlgen.loaders.data import seeded
from evlgen.loaders.interruption import StopRequest
from evlgen.models.vision.timm_encoder import TimmEncoder
from evlgen.processors import build_processor
from evlgen.vision_cache import cache as vision_cache
from evlgen.vision_cache import key as vision_key
from evlgen.vision_cache import store as token_store
from evlgen.vision_cache.cache import cached
from evlgen.vision_cache.key import CacheKey, DistinctImages, weights_digest
from evlgen.vision_cache.store import BROKEN, DONE, TO_DO

ROOT = Path(__file__).resolve().parents[2]
SIZE, IMAGES = 56, 24
TEXT = build_processor({"name": "blip_caption"})
PLAIN = {"name": "blip_image_eval", "image_size": SIZE}
RANDOM = {"name": "blip2_image_train", "image_size": SIZE}
AUGMENTED = {"shapes_caption": {"vis_processor": {"train": {"name": "blip2_image_train"}}}}


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch) -> Path:
    """A data root of the test's own."""
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def model(golden):
    return build_model(golden)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each call of a vision encoder was given, real calls as they come."""
    forward, calls = TimmEncoder.forward, []

    def counted(self, pixels):
        calls.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(TimmEncoder, "forward", counted)
    return calls


def build_model(golden, **vision):
    folder = golden / "evlgen_opt"
    section = OmegaConf.to_container(OmegaConf.load(folder / "model.yaml").model)
    section["vision"] |= {"pretrained": str(folder / section["vision"]["pretrained"]), **vision}
    section["language"]["name"] = str(folder / "language")
    section["checkpoint"] = None
    return registry.get_model_class("evlgen_opt").from_config(section)


def shapes(processor=PLAIN, size=IMAGES, seed=0):
    return ShapesCaptionDataset("train", size, seed, build_processor(processor), TEXT)


def settings(**changes) -> RunConfig:
    return RunConfig(**{"max_epoch": 1, "batch_size_eval": 4, "num_workers": 0, "seed": 3, **changes})


def fill(dataset, model, stop=None, **changes):
    run = settings(cache_vision=True, **changes)
    return cached({"data": dataset}, model, run, Accelerator(cpu=True), stop)["data"]


def key(dataset, model, **changes) -> str:
    weights = weights_digest(model.vision)
    return CacheKey.of(DistinctImages.of(dataset), model, settings(**changes), weights).digest


def train(path, *options):
    """Runs a project; returns the losses of its steps."""
    run_project(Config.load(path, [*options, "run.valid_splits=[]"]))
    lines = (path.parent / "output" / "latest" / "log.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["type"] == "train"]


def stores(data_root) -> list[Path]:
    return sorted((data_root / "vision_tokens").glob("*"))


def photographs(folder: Path, count=6, broken=(3,)) -> list[dict]:
    """Images with two captions each, some of them broken; their records."""
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.RandomState(number).randint(0, 255, (60, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    for number in broken:
        (folder / f"{number}.png").write_bytes(b"no image")
    return [{"image": f"{i}.png", "caption": c} for i in range(count) for c in ("grey noise", "a wall")]


def captions(records: list[dict], folder: Path) -> CaptionDataset:
    """A dataset of such records, as a builder reads them from a file."""
    named = [{"visual": record["image"], "caption": record["caption"]} for record in records]
    return CaptionDataset(named, ImageFiles(folder), build_processor(PLAIN), TEXT)


# ---- training ----


def test_training_gives_the_losses_of_an_encoder_that_rounds_its_tokens_to_bf16(tiny_project, monkeypatch):
    path = tiny_project()
    exact, kept = train(path), train(path, "run.cache_vision=true")
    assert kept[0] == pytest.approx(exact[0], rel=2e-3) and kept != exact
    forward = TimmEncoder.forward
    monkeypatch.setattr(TimmEncoder, "forward", lambda self, x: forward(self, x).bfloat16())
    assert kept == train(path)


def test_each_image_is_encoded_once_and_never_in_training(tiny_project, encoded):
    path = tiny_project()
    first = train(path, "run.cache_vision=true")
    assert sum(encoded) == IMAGES + 1  # one image tells the tokens' shape
    del encoded[:]
    assert train(path, "run.cache_vision=true", "run.num_workers=2") == first
    assert sum(encoded) == 5  # its shape, and four images that are compared with what is kept


def test_each_image_of_an_evaluated_split_is_encoded_once(tiny_project, encoded, data_root):
    path = tiny_project(run={"test_splits": ["val"], "precision": "fp32", "image_use_samples": 0})
    options = ["run.cache_vision=true", "run.cache_vision_eval=true", "run.max_epoch=3"]
    run_project(Config.load(path, options))
    assert sum(encoded) == (IMAGES + 1) + (6 + 1), "three validations and a test of six images"
    assert len(stores(data_root)) == 2
    checkpoint = f"model.checkpoint={path.parent / 'output' / 'latest' / 'checkpoints' / 'best'}"
    del encoded[:]
    options = ["run.evaluate=true", checkpoint]
    kept = run_project(Config.load(path, [*options, "run.cache_vision_eval=true"]))
    assert sum(encoded) == 1 + 4, "its shape, and four that are compared with what is kept"
    assert kept["val"].keys() == run_project(Config.load(path, options))["val"].keys()


def test_of_a_split_that_is_evaluated_in_part_no_other_images_are_encoded(tiny_project, encoded, data_root):
    limits = {"max_valid_samples": 2, "max_eval_samples": 4}
    path = tiny_project(run={"test_splits": ["val"], "image_use_samples": 0, "num_workers": 0, **limits})
    run_project(Config.load(path, ["run.cache_vision=true", "run.cache_vision_eval=true"]))
    # two validations of samples 0 and 3, a test of 0, 1, 3 and 4: two more, and the two that are compared
    assert sum(encoded) == (IMAGES + 1) + (2 + 1) + (2 + 1 + 2)
    assert len(stores(data_root)) == 2
    results = path.parent / "output" / "latest" / "result"
    counts = [len(json.loads(file.read_text())) for file in sorted(results.glob("*/captions.json"))]
    assert counts == [4, 2, 2]


def test_a_resumed_run_gives_the_losses_of_one_never_interrupted(tiny_project, tmp_path):
    dropout = {"connector": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}}
    path = tiny_project(
        model=dropout, run={"max_epoch": 3, "keep_last": 9, "cache_vision": True, "cache_vision_views": 2}
    )
    project = OmegaConf.merge(OmegaConf.load(path), {"datasets": AUGMENTED})
    OmegaConf.save(project, path)
    whole = train(path)
    checkpoint = tmp_path / "output" / "latest" / "checkpoints" / "step_00000006"
    assert train(path, f"run.resume={checkpoint.resolve()}") == whole
    shutil.rmtree(tmp_path / "data")  # filled again: that moves no random generator
    assert train(path, f"run.resume={checkpoint.resolve()}") == whole


def test_two_processes_fill_and_train_and_leave_the_bytes_of_one(forks, tiny_project, tmp_path, monkeypatch):
    for name in ("two", "one"):
        root = tmp_path / name / "coco"
        records = photographs(root / "images")
        (root / "annotations").mkdir()
        (root / "annotations" / "coco_karpathy_train.json").write_text(json.dumps(records))
        for image in (root / "images").iterdir():
            os.utime(image, (1, 1))  # the same files in both data roots
    path = tiny_project(run={"batch_size_train": 2, "batch_size_eval": 2, "max_skipped_share": 1.0})
    project = OmegaConf.load(path)
    project.datasets = {"coco_caption": {}}
    OmegaConf.save(project, path)
    options = ["run.cache_vision=true", "run.cache_vision_views=2", "run.valid_splits=[]"]
    code, shown = forks.run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(ROOT / "train.py", "--cfg-path", path, "--options", *options),
        shown=tmp_path / "shown.txt",
        EVLGEN_CACHE=str(tmp_path / "two"),
    )
    assert code == 0, shown
    listed = (tmp_path / "output" / "latest" / "skipped.jsonl").read_text().splitlines()

    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path / "one"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(path, *options)
    torch.set_num_threads(threads)
    (two,), (one,) = stores(tmp_path / "two"), stores(tmp_path / "one")
    assert two.name == one.name  # the data root's own place is no part of the key
    for name in ("tokens.bf16", "status"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert list((one / "status").read_bytes()) == [DONE, DONE, DONE, BROKEN, DONE, DONE]
    assert {json.loads(line)["id"] for line in listed} == {"3.png"}


def talk(*images: str, answer: str = "grey noise") -> dict:
    turns = [
        {"from": "human", "value": "<image>\n" * len(images) + "what?"},
        {"from": "gpt", "value": answer},
    ]
    return {"conversations": turns, "image": list(images)}


def write_talks(folder: Path, records: list[dict]) -> Path:
    """Conversations about `photographs`."""
    photographs(folder, count=4)
    (folder / "talks.json").write_text(json.dumps(records))
    return folder / "talks.json"


def test_conversations_learn_from_kept_tokens_what_they_learn_from_images(
    tiny_project, tmp_path, encoded, monkeypatch
):
    records = [talk("0.png"), talk("1.png", "0.png", answer="a wall"), talk(), talk("0.png", answer="noise")]
    records += [talk("2.png"), talk(answer="a hill"), talk("0.png", "3.png"), talk("2.png", answer="a cat")]
    run = {"task": "conversation", "max_epoch": 2, "keep_last": 9, "batch_size_train": 2}
    path = tiny_project(run={**run, "group_by_length": True, "max_skipped_share": 0.5})
    project = OmegaConf.load(path)
    annotations = {"train": str(write_talks(tmp_path / "talks", records))}
    project.datasets = {"conversations": {"annotations": annotations}}
    OmegaConf.save(project, path)
    kept = train(path, "run.cache_vision=true")
    assert sum(encoded) == 3 + 1 and len(kept) == 8  # each image once; 3.png is broken
    checkpoint = tmp_path / "output" / "latest" / "checkpoints" / "step_00000004"
    assert train(path, f"run.resume={checkpoint.resolve()}", "run.cache_vision=true")[-4:] == kept[-4:]
    forward = TimmEncoder.forward
    monkeypatch.setattr(TimmEncoder, "forward", lambda self, x: forward(self, x).bfloat16())
    assert train(path) == kept


# ---- what is kept ----


def test_each_image_of_conversations_is_kept_once_and_broken_ones_spoil_only_their_own(model, tmp_path):
    records = [talk("0.png", "1.png"), talk(), talk("3.png", "0.png"), talk("1.png", "0.png", "1.png")]
    folder = tmp_path / "talks"
    builder = registry.get_builder_class("conversations")(
        "talks", tmp_path, {"train": PLAIN}, annotations={"train": str(write_talks(folder, records))}
    )
    dataset = builder.get_split("train")
    kept = fill(dataset, model)
    assert kept.store.entries == 3 and [len(kept[i]["images"]) for i in (0, 1, 3)] == [2, 0, 3]
    assert isinstance(kept[2], Skipped) and kept[2].reason == dataset[2].reason
    batch, plain = (d.collater([d[i] for i in (3, 1, 0)]) for d in (kept, dataset))
    expected = [[model.encode(image[None])[0].bfloat16() for image in of_one] for of_one in plain["images"]]
    for found, wanted in zip(batch.pop("images"), expected, strict=True):
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    given = {"messages": plain["messages"], "images": expected}
    assert model(given)["loss"].item() == pytest.approx(model(plain)["loss"].item(), rel=1e-2)
    assert model.answer_turns({**given, "messages": [m[:-1] for m in given["messages"]]}, max_length=2)
    assert batch == {key: value for key, value in plain.items() if key != "images"}
    assert model.num_soft_prompts(expected[0][0]) == model.num_soft_prompts(plain["images"][0][0])
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    assert fill(dataset, model).store.folder != kept.store.folder
    blind = [dataset.records[1]] * 2
    dataset.records = blind
    assert fill(dataset, model) is dataset, "it shows no images"


def test_samples_hold_the_encoders_tokens_and_what_else_they_held(model):
    dataset = shapes()
    kept = fill(dataset, model)
    for index in (0, 7, 23):
        with seeded(index):
            sample = kept[index]
        with seeded(index):
            expected = dataset[index]
        tokens = model.encode(expected.pop("image")[None])[0]
        assert sample["visual_tokens"].dtype == torch.bfloat16
        torch.testing.assert_close(sample.pop("visual_tokens"), tokens.bfloat16(), rtol=2**-7, atol=1e-6)
        assert sample == expected
    batch = kept.collater([kept[0], kept[1]])
    assert model.soft_prompts(batch).shape == model.soft_prompts({"image": torch.zeros(2, 3, 56, 56)}).shape
    assert len(model.generate(batch, num_beams=1, max_length=3)) == 2


def test_of_an_augmenting_transform_k_views_are_kept_each_with_a_seed_of_its_own(model, caplog):
    dataset, views = shapes(RANDOM), 3
    kept = fill(dataset, model, cache_vision_views=views)
    for entry in (0, 11):
        found = torch.stack([kept.store.read(entry, view) for view in range(views)])
        for view in range(views):
            with seeded(mix_seed(3, entry, view)):
                tokens = model.encode(dataset.load_visual(entry)[None])[0]
            torch.testing.assert_close(found[view], tokens.bfloat16(), rtol=2**-7, atol=1e-6)
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    chosen = []
    for seed in range(60):
        with seeded(seed):
            tokens = kept[5]["visual_tokens"]
        with seeded(seed):
            assert torch.equal(tokens, kept[5]["visual_tokens"])
        chosen.append([torch.equal(tokens, kept.store.read(5, view)) for view in range(views)].index(True))
    assert min(chosen.count(view) for view in range(views)) > 8
    assert "one random view" not in caplog.text
    fill(dataset, model)
    assert "run.cache_vision keeps one random view of each image of 'data'" in caplog.text


def test_filling_and_reading_leave_the_random_generators_where_they_were(model):
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    for dataset in (shapes(RANDOM), shapes(RANDOM)):
        fill(dataset, model, cache_vision_views=2)
    assert (before[0], before[1]) == (random.getstate(), np.random.get_state()[2])
    assert torch.equal(before[2], torch.get_rng_state())


def test_of_a_transform_that_is_not_random_one_view_is_kept_whatever_the_seed(model):
    first = fill(shapes(), model, cache_vision_views=5)
    assert first.store.views == 1
    assert fill(shapes(), model, seed=4).store.folder == first.store.folder
    augmented = fill(shapes(RANDOM), model)
    assert fill(shapes(RANDOM), model, seed=4).store.folder != augmented.store.folder


def test_an_image_with_several_captions_is_kept_once_and_a_broken_one_is_skipped(model, tmp_path):
    records = photographs(tmp_path / "pictures")
    dataset = captions(records, tmp_path / "pictures")
    kept = fill(dataset, model)
    assert kept.store.entries == 6 and len(kept) == 12
    assert [kept[i]["text_input"] for i in (0, 1)] == ["grey noise", "a wall"]
    assert torch.equal(kept[0]["visual_tokens"], kept[1]["visual_tokens"])
    assert isinstance(kept[6], Skipped) and kept[6] == dataset[6] and kept[7] == dataset[7]
    assert "3.png" in kept[6].reason
    (tmp_path / "pictures" / "3.png").write_bytes((tmp_path / "pictures" / "4.png").read_bytes())
    filled = fill(dataset, model)
    assert torch.equal(filled[6]["visual_tokens"], filled[8]["visual_tokens"])


def test_the_card_says_what_a_store_is_of(model):
    store = fill(shapes(), model).store
    card = json.loads((store.folder / "card.json").read_text())
    assert card["dataset"] == "data" and card["pictures"]["count"] == IMAGES
    assert (card["encoder"]["name"], card["encoder"]["image_size"]) == ("eva_clip_g", SIZE)
    assert card["transform"]["name"] == "blip_image_eval"
    assert card["shape"] == [17, 48]
    assert card["bytes"] == IMAGES * 17 * 48 * 2 == (store.folder / "tokens.bf16").stat().st_size


# ---- the key ----


def test_the_key_follows_weights_size_transform_world_and_views(golden, model):
    wide = {**PLAIN, "image_size": 70}
    plain, augmented = key(shapes(), model), key(shapes(RANDOM), model, cache_vision_views=2)
    assert plain == key(shapes(), build_model(golden), batch_size_train=7, seed=9)
    others = [
        plain,
        augmented,
        key(shapes(wide), build_model(golden, image_size=70)),
        key(shapes({**PLAIN, "mean": (0.5, 0.5, 0.5)}), model),
        key(shapes(seed=1), model),
        key(shapes(size=IMAGES - 1), model),
        key(shapes({**RANDOM, "min_scale": 0.51}), model, cache_vision_views=2),
        key(shapes(RANDOM), model, cache_vision_views=3),
        key(shapes(RANDOM), model, cache_vision_views=2, seed=4),
        key(shapes(), build_model(golden, precision="bf16")),
    ]
    with torch.no_grad():
        model.vision.trunk.blocks[1].mlp.fc1.bias[5] += 1e-4
    others.append(key(shapes(), model))
    assert len(set(others)) == len(others)


def test_the_weights_are_read_once_for_all_datasets_and_again_the_next_time(model, monkeypatch, data_root):
    weights = model.vision.state_dict().values()
    places, read, bytes_of = {value.data_ptr() for value in weights}, [], vision_key._bytes

    def counted(tensor):
        read.append(tensor.data_ptr() in places)
        return bytes_of(tensor)

    monkeypatch.setattr(vision_key, "_bytes", counted)
    datasets = {"one": shapes(), "other": shapes(seed=1)}

    def fill_all() -> int:
        cached(datasets, model, settings(cache_vision=True), Accelerator(cpu=True))
        return len(stores(data_root))

    assert fill_all() == 2
    assert sum(read) == len(weights)
    weight = next(model.vision.parameters())
    before = weight.detach().clone()
    weight.data.add_(1)  # which no counter of torch's notices
    assert fill_all() == 4
    weight.data.copy_(before)
    assert fill_all() == 4
    assert sum(read) == 3 * len(weights)


class Noted(ImageFiles):
    """Notes the images whose source is asked for."""

    def source(self, name):
        self.__dict__.setdefault("asked", []).append(name)
        return super().source(name)


class Mirrored(CaptionDataset):
    """Every second sample shows another image than its record names."""

    def visual_source(self, index):
        return f"{super().visual_source(index)} {index % 2}"


@pytest.mark.parametrize("cls", [CaptionDataset, Mirrored])
def test_distinct_images_are_those_of_all_samples_and_each_is_looked_at_once(tmp_path, cls):
    names = ["b.png", "a.png", "b.png", "./a.png", "c.png", "b.png", "c.png"]
    records = [{"visual": name, "caption": str(number)} for number, name in enumerate(names)]
    records.insert(2, BadRecord("record 2", "its caption is empty."))
    dataset = cls(records, Noted(tmp_path), build_processor(PLAIN), TEXT)
    found = DistinctImages.of(dataset)
    asked = [*dataset.media.asked]
    sources = [dataset.visual_source(index) for index in range(len(dataset))]
    assert found.sources == list(dict.fromkeys(sources))
    assert [found.sources[number] for number in found.of_samples] == sources
    assert found.shown == [sources.index(source) for source in found.sources]
    assert found.ends.tolist() == [*range(1, 9)]
    if cls is CaptionDataset:
        assert asked == ["b.png", "a.png", "./a.png", "c.png"] and len(found) == 4


def test_each_image_of_conversations_is_looked_at_once(tmp_path):
    records = [talk("0.png", "1.png"), talk(), talk("1.png", "0.png", "1.png")]
    builder = registry.get_builder_class("conversations")(
        "talks",
        tmp_path,
        {"train": PLAIN},
        annotations={"train": str(write_talks(tmp_path / "talks", records))},
    )
    dataset = builder.get_split("train")
    dataset.media = Noted(tmp_path / "talks")
    found = DistinctImages.of(dataset)
    assert len(dataset.media.asked) == len(found) == 2
    assert found.of_samples.tolist() == [0, 1, 1, 0, 1] and found.ends.tolist() == [2, 2, 5]


def test_the_key_follows_what_a_transform_does_where_no_setting_says_it(model, monkeypatch):
    before = key(shapes(), model)
    processor = type(build_processor(PLAIN))
    call = processor.__call__
    monkeypatch.setattr(processor, "__call__", lambda self, item: call(self, item) * 1.01)
    assert key(shapes(), model) != before


@pytest.mark.parametrize("change", ["time", "size", "name", "order"])
def test_the_key_follows_the_files(model, tmp_path, change):
    records = photographs(tmp_path / "pictures", count=20, broken=())
    before = key(captions(records, tmp_path / "pictures"), model)
    again = key(captions(records, tmp_path / "pictures"), model)
    image = tmp_path / "pictures" / "13.png"  # none of those whose pixels are looked at
    if change == "time":
        os.utime(image, ns=(1, 1))
    elif change == "size":
        stat = image.stat()
        image.write_bytes(image.read_bytes() + b"\0")
        os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        image.rename(image.with_name("thirteen.png"))
        records = [{**r, "image": r["image"].replace("13.png", "thirteen.png")} for r in records]
    else:
        records = records[::-1]
    after = key(captions(records, tmp_path / "pictures"), model)
    assert before == again != after


def test_a_changed_key_gives_another_cache_and_the_first_one_is_left_alone(tiny_project, data_root):
    path = tiny_project(run={"cache_vision": True, "max_epoch": 1})
    first = train(path)
    (store,) = stores(data_root)
    content = (store / "tokens.bf16").read_bytes()
    assert train(path, "datasets.shapes_caption.seed=5") != first
    assert len(stores(data_root)) == 2 and (store / "tokens.bf16").read_bytes() == content
    assert train(path) == first


# ---- interruptions and damage ----


def test_a_killed_fill_goes_on_and_computes_nothing_twice(forks, tiny_project, tmp_path, data_root, encoded):
    plugin = tmp_path / "kill.py"
    plugin.write_text(
        "import os, signal\n"
        "from evlgen.models.vision.timm_encoder import TimmEncoder\n"
        "from evlgen.vision_cache import cache as vision_cache\n"
        "vision_cache._FLUSH_SECONDS = 0.0\n"
        "forward, calls = TimmEncoder.forward, []\n"
        "def killing(self, pixels):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5:\n"  # the first looks at an image; each of the others encodes four
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return forward(self, pixels)\n"
        "TimmEncoder.forward = killing\n"
    )
    path = tiny_project(run={"cache_vision": True, "max_epoch": 1})
    command = [ROOT / "train.py", "--cfg-path", path, "--plugins", plugin]
    code, shown = forks.run(*command, shown=tmp_path / "shown.txt")
    assert code == -signal.SIGKILL, shown
    (store,) = stores(data_root)
    assert list((store / "status").read_bytes()) == [DONE] * 12 + [TO_DO] * 12
    losses = train(path)
    assert sum(encoded) == 1 + 4 + 12  # the shape; four kept ones, compared; the other half
    tokens = (store / "tokens.bf16").read_bytes()
    shutil.rmtree(data_root)
    assert train(path) == losses
    assert (store / "tokens.bf16").read_bytes() == tokens


def test_a_request_to_stop_is_met_between_batches_and_what_was_computed_is_kept(model, encoded):
    stop = StopRequest()
    stop.received = signal.SIGINT
    with pytest.raises(Interrupted, match="stopped by Ctrl-C while filling the vision cache"):
        fill(shapes(), model, stop)
    del encoded[:]
    fill(shapes(), model)
    assert sum(encoded) == 1 + 2 + IMAGES - 4  # the shape; two kept ones, compared; the rest


def test_a_run_waits_for_another_that_fills_the_same_cache(model):
    import fcntl

    stop = StopRequest()
    stop.received = signal.SIGTERM
    store = fill(shapes(), model).store
    (store.folder / "status").write_bytes(bytes(IMAGES))
    with open(store.folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Interrupted):
            fill(shapes(), model, stop)
    assert (store.folder / "status").read_bytes() == bytes(IMAGES)  # not one batch was computed


def test_an_image_that_could_not_be_read_is_tried_again_in_the_next_run(model):
    kept = fill(shapes(), model)
    expected = kept[9]["visual_tokens"]
    status = bytearray((kept.store.folder / "status").read_bytes())
    status[9] = BROKEN
    (kept.store.folder / "status").write_bytes(status)
    kept.store.refresh()
    assert isinstance(kept[9], Skipped)
    assert torch.equal(fill(shapes(), model)[9]["visual_tokens"], expected)


def test_too_little_disk_space_is_said_with_the_size_before_anything_is_written(
    tiny_project, data_root, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(
        TrainingError, match=r"needs 39\.2 kB for 24 images .* has 5\.0 kB left.*EVLGEN_CACHE"
    ):
        train(tiny_project(), "run.cache_vision=true")
    assert not stores(data_root)


def test_a_full_disk_is_named_and_what_was_written_before_is_kept(model, monkeypatch, data_root):
    fsync, calls = os.fsync, []

    def full(handle):  # the third group's tokens do not reach the disk
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(vision_cache, "_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(token_store.os, "fsync", full)
    with pytest.raises(TrainingError, match="is full before all 39.2 kB of 'data' are written"):
        fill(shapes(), model)
    (store,) = stores(data_root)
    assert list((store / "status").read_bytes()) == [DONE] * 8 + [TO_DO] * 16


@pytest.mark.parametrize("name", ["tokens.bf16", "status", "card.json"])
def test_a_damaged_store_is_named_with_the_remedy(model, name):
    folder = fill(shapes(), model).store.folder
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{name}.*damaged. Delete {folder}"):
        fill(shapes(), model)


def test_tokens_that_the_encoder_does_not_make_any_more_are_refused(model, monkeypatch):
    fill(shapes(), model)
    forward = TimmEncoder.forward
    monkeypatch.setattr(TimmEncoder, "forward", lambda self, x: forward(self, x) * 1.2)
    with pytest.raises(DataError, match=r"holds other tokens than this vision encoder makes.*\(17% apart\)"):
        fill(shapes(), model)


# ---- what cannot be cached ----


def test_a_trained_encoder_is_refused_before_anything_is_loaded(tiny_project, golden):
    path = tiny_project(model={"vision": {"freeze": False}}, run={"cache_vision": True})
    with pytest.raises(ConfigError, match=r"run.cache_vision .*other tokens at every step.*freeze: true"):
        Config.load(path)
    evaluates = ["run.evaluate=true", "run.test_splits=[test]"]
    assert Config.load(path, evaluates)
    with pytest.raises(ConfigError, match=r"run.cache_vision_eval .*freeze: true"):
        Config.load(path, [*evaluates, "run.cache_vision_eval=true"])
    with pytest.raises(ConfigError, match=r"the vision encoder is trained \(trunk"):
        fill(shapes(), build_model(golden, freeze=False))


def test_views_without_the_cache_are_refused(tiny_project):
    with pytest.raises(ConfigError, match="run.cache_vision_views .*cache_vision: true only"):
        Config.load(tiny_project(), ["run.cache_vision_views=4"])


class _Whole(BaseDataset):
    def load_sample(self, index):
        return {"image": torch.zeros(3, SIZE, SIZE), "text_input": ""}


class _Extended(ShapesCaptionDataset):
    def load_sample(self, index):
        return {**super().load_sample(index), "more": 1}


def test_a_dataset_that_reads_a_sample_as_a_whole_trains_but_cannot_be_cached(model):
    assert set(_Whole(range(3))[1]) == {"image", "text_input"}
    with pytest.raises(ConfigError, match="_Whole of dataset 'data' does not define load_visual, load_text"):
        fill(_Whole(range(3)), model)
    extended = _Extended("train", 3, 0, build_processor(PLAIN), TEXT)
    with pytest.raises(ConfigError, match="_Extended of dataset 'data' defines load_sample as well"):
        fill(extended, model)

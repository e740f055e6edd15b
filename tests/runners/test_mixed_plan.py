"""Map-style sets and streams together: shares, ranks, workers, and going on where a run was interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from shard_files import sample, write_shard, write_shards

from evlgen.assemble import run
from evlgen.common.errors import ConfigError, TrainingError
from evlgen.config.config import Config
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.datasets.shards import ShardDataset
from evlgen.loaders import mixed_plan
from evlgen.loaders.data import BatchPlan, train_loader
from evlgen.loaders.mixed_plan import (
    PARTITIONS,
    MixedPlan,
    StreamSlot,
    check_training_data,
    make_plan,
    split_ratios,
)
from evlgen.processors import build_processor
from evlgen.runners.skipped import SkippedSamples


def take(count, **options):
    return list(islice(MixedPlan(**{"batch_size": 4, "seed": 1, **options}), count))


def places(batches):
    return [place for batch in batches for place, _ in batch]


class Numbers(BaseDataset):
    """Samples that are random but for their index."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count))

    def load_sample(self, index):
        return {"image": torch.rand(3, 8, 8), "text_input": str(index), "image_id": index, "instance_id": ""}


def stream(shards) -> ShardDataset:
    image = build_processor({"name": "blip2_image_train", "image_size": 8})
    return ShardDataset(shards, image, build_processor({"name": "blip_caption"}), shuffle_buffer=4)


# ---- the plan ----


def test_each_dataset_has_its_share_of_the_samples():
    options = {"lengths": [50, 70, None], "streams": [False, False, True], "ratios": [1.0, 3.0, 4.0]}
    drawn = places(take(2000, **options))
    shares = Counter(2 if isinstance(p, StreamSlot) else int(p >= 50) for p in drawn)
    for dataset, share in enumerate((1 / 8, 3 / 8, 4 / 8)):
        deviation = (share * (1 - share) / 8000) ** 0.5
        assert abs(shares[dataset] / 8000 - share) < 4 * deviation


def test_without_ratios_the_shares_are_the_lengths():
    drawn = places(take(1000, lengths=[900, 100], streams=[True, False]))
    assert 0.08 < sum(isinstance(p, int) for p in drawn) / 4000 < 0.12
    assert MixedPlan([900, 100], [True, False], 4, seed=1, world_size=2).batches_per_epoch == 125
    assert MixedPlan([None, 100], [True, False], 4, 1, ratios=[1, 1]).batches_per_epoch is None


def test_two_ranks_share_a_map_style_set_and_its_samples_come_once_before_any_comes_twice():
    options = {"lengths": [30, None], "streams": [False, True], "ratios": [1.0, 1.0], "world_size": 2}
    ranks = [take(40, rank=rank, **options) for rank in (0, 1)]
    in_order = [p for pair in zip(*ranks, strict=True) for p in places(pair) if isinstance(p, int)]
    assert len(in_order) > 120
    for first in range(0, len(in_order) - 30, 30):
        assert sorted(in_order[first : first + 30]) == list(range(30))
    assert in_order[:30] != in_order[30:60]


def test_batches_take_the_partitions_in_turn_and_no_two_ranks_have_one_in_common():
    options = {"lengths": [None], "streams": [True], "world_size": 2}
    for rank in (0, 1):
        batches = take(2 * PARTITIONS + 1, rank=rank, **options)
        for number, batch in enumerate(batches):
            turn, partition = divmod(number, PARTITIONS)
            slots = [place for place, _ in batch]
            assert {slot.partition.index for slot in slots} == {rank * PARTITIONS + partition}
            assert [slot.ordinal for slot in slots] == [4 * turn, 4 * turn + 1, 4 * turn + 2, 4 * turn + 3]
            assert {slot.partition.count for slot in slots} == {2 * PARTITIONS}


@pytest.mark.parametrize("rank", [0, 1])
def test_starting_later_gives_the_rest_of_the_same_sequence(rank, monkeypatch):
    monkeypatch.setattr(mixed_plan, "_BLOCK", 50)  # batches of all ranks straddle blocks
    options = {
        "lengths": [13, None, 40],
        "streams": [False, True, True],
        "ratios": [1.0, 2.0, 1.0],
        "rank": rank,
        "world_size": 2,
    }
    whole = take(60, **options)
    for start in (1, 17, 18, 45):
        assert take(60 - start, start=start, **options) == whole[start:]


def test_every_random_choice_has_a_seed_of_its_own():
    batches = take(200, lengths=[20, None], streams=[False, True], ratios=[1.0, 1.0])
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 800


def test_without_a_stream_the_plan_is_the_one_of_epochs():
    assert isinstance(make_plan([Numbers(5)], 2, 1), BatchPlan)


# ---- the loader ----


def read(datasets, count, num_workers=0, start=0, **options):
    plan = make_plan(list(datasets.values()), 3, seed=5, **options)
    plan.start = start
    batches = islice(train_loader(datasets, plan, num_workers, pin_memory=False), count)
    return [(b["sample_id"], b["text_input"], b["image"], [s.id for s in b["skipped"]]) for b in batches]


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) and a[3] == b[3] for a, b in zip(one, two, strict=True)
    )


def test_batches_do_not_depend_on_workers_or_on_where_the_run_began(tmp_path):
    shards = write_shards(tmp_path, [9, 14])
    shards.append(write_shard(tmp_path / "9.tar", {**sample("x"), "y.png": b"broken", "y.txt": b"y"}))
    datasets = {"numbers": Numbers(10), "shards": stream(shards)}

    def again(*args, **options):
        return read({"numbers": Numbers(10), "shards": stream(shards)}, *args, ratios=[1, 4], **options)

    whole = read(datasets, 48, ratios=[1, 4])
    assert {name.split(":")[0] for names, *_ in whole for name in names} == {"numbers", "shards"}
    assert any(skipped == ["9.tar/y"] for *_, skipped in whole)
    for workers in (1, 2, 3):
        assert same(whole, again(48, num_workers=workers))
    assert same(whole[19:], again(29, start=19))
    assert same(whole[30:], again(18, num_workers=2, start=30))


def test_two_ranks_read_different_samples_and_together_all(tmp_path):
    shards = write_shards(tmp_path, [16] * 4)
    seen = [
        {n for names, *_ in read({"s": stream(shards)}, 16, rank=r, world_size=2) for n in names}
        for r in (0, 1)
    ]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 64


# ---- a run ----


def test_what_a_stream_cannot_do_is_said_before_anything_is_loaded(tmp_path):
    unknown = stream(write_shards(tmp_path, [1]))
    known = stream(unknown.records)
    known.num_samples = 1
    datasets = {"ccs14M": {"train": unknown}, "numbers": {"train": Numbers(3), "val": Numbers(3)}}
    iterations = {"max_iters": 5, "valid_splits": ["val"]}
    cases = {
        "max_epoch: the number of samples .* 'ccs14M' .*num_samples, or give .*max_iters": {"max_epoch": 1},
        "train_dataset_ratios: the number of samples": iterations,
        "cache_vision: dataset 'ccs14M' is a stream": {**iterations, "cache_vision": True},
        "valid_splits: dataset 'ccs14M' is a stream.* instead of 'train'": {
            "max_iters": 5,
            "valid_splits": ["train"],
        },
    }
    for message, settings in cases.items():
        with pytest.raises(ConfigError, match=message):
            check_training_data(RunConfig(**{"valid_splits": ["val"], **settings}), datasets)
    check_training_data(
        RunConfig(**iterations, train_dataset_ratios={"ccs14M": 1.0, "numbers": 1.0}), datasets
    )
    check_training_data(RunConfig(**iterations), {"ccs14M": {"train": unknown}})
    check_training_data(
        RunConfig(max_epoch=1, valid_splits=["val"]), {**datasets, "ccs14M": {"train": known}}
    )


def test_every_dataset_that_is_trained_on_needs_a_ratio():
    datasets = {"a": {"train": Numbers(3)}, "b": {"train": Numbers(6)}, "c": {"val": Numbers(3)}}
    for ratios, message in {
        ("a",): "train_dataset_ratios has no 'b', which would not be trained on",
        ("a", "b", "c"): "names 'c', which is not trained on",
    }.items():
        given = RunConfig(max_iters=5, train_dataset_ratios=dict.fromkeys(ratios, 1.0))
        with pytest.raises(ConfigError, match=message):
            check_training_data(given, datasets)
        check_training_data(dataclasses.replace(given, evaluate=True), {"c": datasets["c"]})
    check_training_data(RunConfig(max_iters=5, train_dataset_ratios={"a": 1.0, "b": 1.0}), datasets)
    named = [("a", Numbers(3)), ("a", Numbers(9)), ("b", Numbers(5))]
    assert split_ratios({"a": 4.0, "b": 7.0}, named) == [1.0, 3.0, 7.0]
    assert split_ratios(None, named) is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_stops_where_half_of_the_shards_are_lost_though_few_samples_are_skipped(tmp_path, world_size):
    shards = write_shards(tmp_path, [40] * 6)
    for shard in shards[1::2]:
        Path(shard).write_bytes(b"garbage" * 1000)
    for rank in range(world_size):
        datasets = {"web": stream(shards)}
        plan = make_plan([datasets["web"]], 8, seed=5, rank=rank, world_size=world_size, has_epochs=False)
        skipped = SkippedSamples(tmp_path, 0.49, world_size)
        with pytest.raises(TrainingError, match=r"5\d\.\d% of the shards of dataset 'web' could not be read"):
            for number, batch in enumerate(islice(train_loader(datasets, plan, 0, False), 100)):
                skipped.pop_skipped(batch, number)
        assert skipped.causes.total() < 0.25 * skipped.seen


def test_a_split_that_only_shards_could_have_is_refused_with_a_remedy(tiny_project, tmp_path):
    write_shards(tmp_path / "s", [2])
    path = tiny_project()
    content = OmegaConf.load(path)
    content.datasets = {"web_shards": {"build_info": {"storage": f"{tmp_path}/s/*.tar"}}}
    OmegaConf.save(content, path)
    with pytest.raises(ConfigError, match="web_shards: shards, for training only. .* run.valid_splits: .."):
        run(Config.load(path))


def test_a_run_on_shards_and_images_goes_on_bit_for_bit_with_any_number_of_workers(tiny_project, tmp_path):
    write_shards(tmp_path / "s", [5, 6])
    settings = {
        "max_epoch": None,
        "max_iters": 9,
        "save_every": 5,
        "keep_last": 99,
        "valid_splits": [],
        "precision": "fp32",
        "train_dataset_ratios": {"web_shards": 2.0, "shapes_caption": 1.0},
    }
    section = {"web_shards": {"build_info": {"storage": f"{tmp_path}/s/*.tar"}, "shuffle_buffer": 3}}
    path = tiny_project(run=settings, datasets=section)
    run(Config.load(path))
    folder = (tmp_path / "output" / "latest").resolve()
    final, log = folder / "checkpoints" / "step_00000009" / "model.safetensors", folder / "log.jsonl"
    weights, losses = load_file(final), losses_in(log)
    assert len(losses) == 9
    saved = json.loads((final.parent / "training_state" / "progress.json").read_text())
    assert saved["data"] == {
        "samples": [24, None],  # no epochs: nobody counts the stream
        "batch_size": 4,
        "processes": 1,
        "shards": [2],
        "lanes": PARTITIONS,
    }
    final.unlink()
    step = folder / "checkpoints" / "step_00000005"
    run(Config.load(path, [f"run.resume={step}", "run.num_workers=2"]))
    again = load_file(final)
    assert losses_in(log) == losses
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def losses_in(log: Path) -> list[float]:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record["loss"] for record in records if record["type"] == "train"]

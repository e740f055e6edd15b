"""Retrieval: recalls by hand, the task against a slow form, on one process and on two, and a whole run."""

from __future__ import annotations

import json
import math
import os
import socket

import pytest
import torch
from data_root import _images, _json

from evlgen.assemble import run
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import Config, load_model_config
from evlgen.config.run_config import RunConfig
from evlgen.datasets.caption_builders import Flickr30kRetrievalBuilder
from evlgen.tasks.retrieval import rank, ranks_of_images, recalls

CONNECTOR = {
    "name": "qformer",
    "num_query_token": 4,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXTS = [["a red circle", "one circle, red"], ["a blue square"], ["two green stars", "stars", "green"]]
TEXTS += [["a red circle and a square"], ["nothing"], ["blue and red"], ["a small star"]]
COUNT = len(TEXTS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = registry.get_model_class("blip2").from_config(
        load_model_config("blip2", "shapes", overrides={"connector": CONNECTOR})
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # or all images and texts are nearly alike
        for p in model.parameters():
            if p.requires_grad and p.ndim:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Flickr30k in its published layout."""
    root = tmp_path_factory.mktemp("data")
    names = [f"flickr30k-images/{i}.jpg" for i in range(COUNT)]
    _images(root / "flickr30k" / "images", names)
    rows = [{"image": n, "caption": t} for n, t in zip(names, TEXTS, strict=True)]
    _json(root / "flickr30k" / "annotations" / "test.json", rows)
    train = [{"image": r["image"], "caption": c} for r in rows for c in r["caption"]]
    _json(root / "flickr30k" / "annotations" / "train.json", train)
    _json(root / "flickr30k" / "annotations" / "val.json", rows[:3])
    return root


@pytest.fixture(scope="module")
def dataset(root, model):
    visual = {"eval": {"name": "blip_image_eval", "image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}}
    text = {"eval": {"name": "blip_caption"}}
    info = {
        "annotations": {"test": {"storage": "flickr30k/annotations/test.json"}},
        "images": {"storage": "flickr30k/images"},
    }
    return Flickr30kRetrievalBuilder("flickr30k_retrieval", root, visual, text, info).get_split("test")


def results_of(model, dataset, k_test: int, indices=range(COUNT)):
    """What the task finds of some samples, in two batches."""
    task = registry.get_task_class("retrieval")(RunConfig(task="retrieval", k_test=k_test))
    task.before_evaluation(dataset, "test")
    for part in (list(indices)[:3], list(indices)[3:]):
        samples = [dataset[i] for i in part]
        if samples:
            batch = {key: [s[key] for s in samples] for key in samples[0]}
            assert task.valid_step(model, {**batch, "image": torch.stack(batch["image"])}) == []
    return task, task.finish_evaluation(model, [], dataset)


def slow_metrics(model, dataset, k_test: int) -> dict[str, float]:
    """As published: two matrices of scores, filled with -100 (which is not found), and sorting."""
    images = torch.stack([dataset[i]["image"] for i in range(COUNT)])
    texts = [text for of_one in TEXTS for text in of_one]
    owner = [i for i, of_one in enumerate(TEXTS) for _ in of_one]
    pairs = [{"image": i.expand(len(texts), -1, -1, -1), "text_input": texts} for i in images]
    sims = torch.stack([model.match(of_one, "itc")[:, 0] for of_one in pairs])
    fits = torch.stack([model.match(of_one, "itm")[:, 1] for of_one in pairs])
    by_image, by_text = torch.full_like(sims, -100), torch.full_like(sims.T, -100)
    if not k_test:
        by_image, by_text = sims, sims.T
    for i in range(COUNT if k_test else 0):
        for t in sims[i].topk(k_test).indices:
            by_image[i, t] = sims[i, t] + fits[i, t]
    for t in range(len(texts) if k_test else 0):
        for i in sims[:, t].topk(k_test).indices:
            by_text[t, i] = sims[i, t] + fits[i, t]

    def place(scores: torch.Tensor, column: int) -> float:
        found = scores.sort(descending=True).indices.tolist().index(column)
        return math.inf if scores[column] == -100 else found

    own = [[t for t in range(len(texts)) if owner[t] == i] for i in range(COUNT)]
    text_places = [min(place(by_image[i], t) for t in own[i]) for i in range(COUNT)]
    image_places = [place(by_text[t], owner[t]) for t in range(len(texts))]
    found = {}
    for name, places in (("txt", text_places), ("img", image_places)):
        for k in (1, 5, 10):
            found[f"{name}_r{k}"] = 100 * sum(place < k for place in places) / len(places)
        found[f"{name}_r_mean"] = sum(found[f"{name}_r{k}"] for k in (1, 5, 10)) / 3
    found["r_mean"] = (found["txt_r_mean"] + found["img_r_mean"]) / 2
    return {**found, "agg_metrics": found["txt_r_mean"]}


def test_recalls_by_hand():
    metrics = recalls([1, 3, None, 6], [2, 1, 1, 11])
    assert metrics == {
        **{"txt_r1": 25, "txt_r5": 50, "txt_r10": 75, "txt_r_mean": 50},
        **{"img_r1": 50, "img_r5": 75, "img_r10": 75, "img_r_mean": pytest.approx(200 / 3)},
        **{"r_mean": pytest.approx(175 / 3), "agg_metrics": 50},
    }


def test_ranks_by_hand():
    right = torch.tensor([False, True, False, True])
    assert rank(torch.tensor([0.1, 0.9, 0.5, 0.2]), right) == 1
    assert rank(torch.tensor([0.7, 0.1, 0.5, 0.6]), right) == 2, "the first of several right ones counts"
    assert rank(torch.tensor([0.5, 0.5, 0.5, 0.5]), right) == 3, "who finds all alike finds nothing"
    assert rank(torch.tensor([0.5, -torch.inf, 0.2, -torch.inf]), right) is None
    assert rank(torch.full((4,), torch.nan), right) == 3, "nor who finds no numbers"
    results = [
        {"image_id": "a", "texts": torch.tensor([0, 2]), "scores": torch.tensor([0.5, 0.9])},
        {"image_id": "b", "texts": torch.tensor([0, 1, 2]), "scores": torch.tensor([0.6, 0.1, 0.2])},
    ]
    assert ranks_of_images(results, ["a", "a", "b"]) == [2, None, 2]
    results.append({**results[0], "image_id": "without texts"})
    assert len(ranks_of_images(results, ["a", "a", "b"])) == 3


@pytest.mark.parametrize("k_test", [0, 3, 128])
def test_the_task_gives_what_the_slow_form_gives(model, dataset, tmp_path, k_test):
    task, results = results_of(model, dataset, k_test)
    metrics = task.after_evaluation(results[::-1], dataset, "test", tmp_path)
    num_texts = sum(map(len, TEXTS))
    slow = slow_metrics(model, dataset, k_test if k_test < COUNT else 0) if k_test < COUNT else None
    if slow is not None:
        assert metrics == pytest.approx(slow)
    assert 0 < metrics["r_mean"] < 100, "or the comparison compares nothing"
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert [row["image_id"] for row in written["images"]] == list(range(COUNT))
    assert len(written["texts"]) == num_texts
    if k_test >= num_texts:
        assert all(row["rank"] is not None for part in written.values() for row in part)


def _process(rank_: int, port: int, model, dataset, folder) -> None:
    os.environ |= {"RANK": str(rank_), "LOCAL_RANK": str(rank_), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from accelerate import PartialState
    from accelerate.utils import gather_object

    assert PartialState(cpu=True).num_processes == 2
    task, results = results_of(model, dataset, 3, range(rank_, COUNT, 2))
    everything = gather_object(results)
    if rank_ == 0:
        task.after_evaluation(everything, dataset, "test", folder)
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(forks, model, dataset, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = [forks.start(_process, rank, port, model, dataset, tmp_path / "two") for rank in range(2)]
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    task, results = results_of(model, dataset, 3)
    task.after_evaluation(results, dataset, "test", tmp_path / "one")
    for name in ("metrics.json", "retrieval.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


PROJECT = """
model: {arch: blip2, model_type: shapes, connector: CONNECTOR}
datasets: {flickr30k_retrieval: {vis_processor: {train: {name: blip2_image_train}}}}
run: {task: retrieval, k_test: 3, max_iters: 2, batch_size_train: 4, num_workers: 0, tensorboard: false,
      valid_splits: [val], test_splits: [test], output_dir: OUTPUT}
"""


def test_a_run_trains_validates_and_tests(root, tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(root))
    text = PROJECT.replace("CONNECTOR", json.dumps(CONNECTOR)).replace("OUTPUT", str(tmp_path / "output"))
    (tmp_path / "project.yaml").write_text(text)
    metrics = run(Config.load(tmp_path / "project.yaml"))
    assert {"txt_r1", "img_r10", "r_mean"} <= set(metrics["test"])
    files = sorted(p.parent.name for p in (tmp_path / "output").rglob("retrieval.json"))
    assert len(files) == 2


def test_what_cannot_be_is_named(dataset, model, tmp_path):
    task = registry.get_task_class("retrieval")(RunConfig(task="retrieval"))
    other = registry.get_model_class("evlgen_opt")
    with pytest.raises(ConfigError, match=r"EvlgenOPT does not have\. Take model\.arch: blip2"):
        task.valid_step(other.__new__(other), {})
    with pytest.raises(DataError, match="1 of 2 images have no texts to be found by, such as 'x'"):
        task._texts([0, "x"], dataset)
    with pytest.raises(ConfigError, match="a model of images, and a video was given"):
        samples = {"image": torch.zeros(1, 3, 2, 64, 64), "image_id": [0], "instance_id": ["0"]}
        task.valid_step(model, samples)

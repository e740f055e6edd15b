"""How much a model uses its images: what is measured, logged and warned of."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch import nn

from evlgen.assemble import run
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.models.connectors.base import Connector
from evlgen.runners.image_use import ImageUse, ImageUseMeter, common_fraction, exchange
from evlgen.runners.log_fields import IMAGE_USE


@registry.register_connector("constant_for_tests")
class ConstantConnector(Connector):
    """Gives the same soft prompts for every image: what a collapsed connector gives."""

    def __init__(self, vision_dim, language_dim, num_tokens=None, num_prefix_tokens=1, embedding_rms=None):
        super().__init__()
        self.prompts = nn.Parameter(0.1 * torch.randn(4, language_dim))

    def forward(self, tokens):
        return self.prompts.expand(len(tokens), -1, -1) + 0.0 * tokens.mean()

    def num_soft_prompts(self, num_tokens):
        return len(self.prompts)


CONSTANT = "model.connector={name: constant_for_tests}"


def evaluations(path, *options):
    run(Config.load(path, options))
    lines = (path.parent / "output" / "latest" / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == "evaluation"]


def test_a_connector_that_returns_a_constant_is_reported_as_ignoring_the_image(tiny_project, caplog):
    with caplog.at_level(logging.WARNING, "evlgen"):
        (found,) = evaluations(tiny_project(run={"max_epoch": 1}), CONSTANT, "model.checkpoint=null")
    assert abs(found["image_worth"]) < 1e-6 and found["common_fraction"] == pytest.approx(1.0)
    assert found["eval_loss"] == pytest.approx(found["exchanged_loss"])
    (warning,) = (r.getMessage() for r in caplog.records if "ignores the image" in r.getMessage())
    assert "100.0 % of the soft prompts is common to all images" in warning
    assert "docs/training-on-real-parts.md" in warning


def test_the_bundled_model_uses_its_images_and_is_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "evlgen"):
        found = bundled("projects/shapes/caption.yaml", tmp_path, "run.valid_splits=[val]")[0]
    assert set(IMAGE_USE) <= set(found)
    assert found["image_worth"] == pytest.approx(found["exchanged_loss"] - found["eval_loss"])
    assert found["image_worth"] > 0.3 and 0 < found["common_fraction"] < 0.9
    assert found["train_loss"] > 0
    text = caplog.text
    assert "the image is worth" in text and "ignores the image" not in text


def bundled(project, folder, *options):
    """The evaluations of a step of the bundled model on the Shapes world."""
    short = [
        *(
            "run.max_iters=1",
            "run.iters_per_inner_epoch=null",
            "run.batch_size_train=2",
            "run.warmup_steps=0",
        ),
        *("run.batch_size_eval=4", "run.num_workers=0", "run.max_eval_samples=8", "run.tensorboard=false"),
        *("run.metrics=[bleu]", "run.precision=fp32", "run.init_lr=1e-9", "run.min_lr=0", "run.warmup_lr=0"),
        *("model.checkpoint=evlgen://assets/shapes/connector", "run.test_splits=[test]"),
    ]
    name = next(iter(Config.load(project).datasets))
    places = [f"datasets.{name}.train_size=4", f"run.output_dir={folder}"]
    run(Config.load(project, [*short, *places, *options]))
    lines = (folder / "latest" / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == "evaluation"]


def test_it_is_not_warned_of_before_the_warm_up_is_over(tiny_project, caplog):
    path = tiny_project(run={"max_epoch": 1, "warmup_steps": 1000})
    with caplog.at_level(logging.WARNING, "evlgen"):
        evaluations(path, CONSTANT, "model.checkpoint=null")
    assert "ignores the image" not in caplog.text


def test_the_measure_can_be_turned_off(tiny_project):
    found = evaluations(tiny_project(run={"max_epoch": 1, "image_use_samples": 0}))[-1]
    assert not set(IMAGE_USE) & set(found)


def test_no_other_number_of_a_run_depends_on_the_measure(tiny_project):
    records = []
    for samples in (0, 256):
        path = tiny_project(run={"image_use_samples": samples})
        run(Config.load(path))
        lines = (path.parent / "output" / "latest" / "log.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines])
    for without, with_it in zip(*records, strict=True):
        skipped = ("time", "seconds", "trained_seconds", "samples_per_s")
        assert {k: v for k, v in without.items() if k not in skipped} == {
            k: v for k, v in with_it.items() if k not in (*skipped, *IMAGE_USE)
        }


@pytest.mark.parametrize(
    "project",
    ["projects/shapes/vqa.yaml", pytest.param("projects/shapes/video_caption.yaml", marks=pytest.mark.slow)],
)
def test_questions_and_videos_are_measured_too(project, tmp_path):
    found = bundled(project, tmp_path)[-1]
    assert found["exchanged_loss"] > found["eval_loss"] > 0


CAPTIONING, QUESTIONS, VIDEOS = (
    f"projects/shapes/{name}.yaml" for name in ("caption", "vqa", "video_caption")
)


@pytest.mark.parametrize("project", [QUESTIONS, VIDEOS])
def test_questions_and_videos_that_are_ignored_are_reported(project, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "evlgen"):
        found = bundled(project, tmp_path, CONSTANT, "model.checkpoint=null")[-1]
    assert abs(found["image_worth"]) < 1e-6 and found["common_fraction"] == pytest.approx(1.0)
    assert "the model ignores the image" in caplog.text


def test_the_first_stage_is_measured_by_its_loss_of_writing(tmp_path):
    """BLIP-2's first stage sums three losses, one of which is in nats per token."""
    options = ["model.checkpoint=null", "run.valid_splits=[val]", "run.test_splits=[]"]
    found = bundled("projects/blip2/shapes_stage1.yaml", tmp_path, *options)[-1]
    assert found["eval_loss"] == pytest.approx(7.0, abs=2.0)  # of an untrained writer, near ln(vocabulary)


class Reader:
    """A model whose loss of a text is how far its image is from the one the text names."""

    def soft_prompts(self, samples):
        return samples["image"]

    def sample_losses(self, samples, soft_prompts):
        losses = (soft_prompts - samples["named"]).abs().sum((1, 2))
        return {"losses": losses, "num_tokens": torch.tensor(samples["tokens"])}


def batch(values, keys, tokens):
    image = torch.tensor(values).view(-1, 1, 1)
    return {"image": image, "named": image.clone(), "image_id": keys, "tokens": tokens}


def test_worth_is_the_difference_of_the_losses_per_token():
    meter = ImageUseMeter(10)
    meter.add(Reader(), batch([1.0, 3.0], ["a", "b"], [2, 4]))
    use = meter.over_processes()
    assert use.loss == 0.0
    assert use.worth == pytest.approx((2.0 + 2.0) / 6)
    assert use.common_fraction == pytest.approx(4.0 / 5.0)  # the mean is 2, the mean square 5
    assert use.num_samples == 2


def test_batches_of_one_image_are_read_with_another_one_and_each_counts_once():
    class Offset(Reader):
        """Has a loss with the right image too, by which one sees whose losses were counted."""

        def sample_losses(self, samples, soft_prompts):
            found = super().sample_losses(samples, soft_prompts)
            return {**found, "losses": found["losses"] + samples["named"].flatten()}

    meter = ImageUseMeter(10)
    for values, keys in (
        ([1.0], ["a"]),  # nothing was seen before it
        ([1.0, 1.0], ["a", "a"]),
        ([3.0], ["b"]),
        ([3.0], ["b"]),
        ([6.0], ["c"]),
    ):
        meter.add(Offset(), batch(values, keys, [1] * len(keys)))
    use = meter.over_processes()
    assert use.num_samples == 6 and use.loss == pytest.approx((3 * 1.0 + 2 * 3.0 + 6.0) / 6)
    assert use.worth == pytest.approx((3 * 2.0 + 2 * 2.0 + 3.0) / 6)


def test_where_all_samples_are_of_one_image_nothing_is_measured():
    meter = ImageUseMeter(10)
    for _ in range(3):
        meter.add(Reader(), batch([1.0], ["a"], [1]))
    assert meter.over_processes() is None, "of which it cannot be said that it is ignored"


@pytest.mark.parametrize(
    "keys", [["a", "b"], ["a", "a", "b", "b", "c"], ["a", "b", "a", "c", "b", "a"], list(range(7))]
)
def test_every_sample_gets_another_image_and_every_image_goes_around(keys):
    order = exchange(keys)
    assert sorted(order) == list(range(len(keys)))
    assert all(keys[i] != keys[j] for i, j in enumerate(order))


@pytest.mark.parametrize("keys", [[], ["a"], ["a", "a", "a", "b"]])
def test_where_most_samples_are_of_one_image_nothing_is_exchanged(keys):
    assert exchange(keys) is None


def test_the_common_part_over_processes_is_that_of_all_samples_together():
    prompts = torch.randn(12, 3, 5, dtype=torch.float64) + 0.5
    parts = [(p.sum(0), p.square().sum().item(), len(p)) for p in prompts.split([5, 7])]
    expected = prompts.mean(0).square().sum() / prompts.square().sum((1, 2)).mean()
    assert common_fraction(parts) == pytest.approx(expected.item())
    assert common_fraction([(None, 0.0, 0)]) is None


def measured(worth, error, common=0.5, samples=100):
    return ImageUse(1.0, 1.0 + worth, error, common, samples)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (measured(0.3, 0.02), ""),
        (measured(0.001, 0.0001), "ignores the image"),
        (measured(0.03, 0.02), "ignores the image"),
        (measured(0.3, 0.02, common=0.995), "nearly constant"),
        (measured(0.2, 0.15, samples=4), "cannot be told from 4 samples"),
        (measured(0.0, 0.0, common=1.0, samples=4), "ignores the image"),
        (ImageUse(*[math.nan] * 3, 0.999, 0), "ignores the image"),
        (ImageUse(*[math.nan] * 3, 0.5, 0), ""),
    ],
)
def test_a_warning_says_what_is_wrong_and_no_more(use, words):
    assert words in use.warning() if words else not use.warning()


def test_samples_with_losses_that_are_not_finite_are_left_out_and_counted():
    meter = ImageUseMeter(10)
    meter.add(Reader(), batch([1.0, 3.0], ["a", "b"], [2, 4]))
    meter.add(Reader(), batch([float("inf"), 3.0], ["c", "d"], [1, 1]))
    use = meter.over_processes()
    assert use.worth == pytest.approx(4.0 / 6) and use.num_samples == 2 and use.num_left_out == 2
    assert "2 samples with a loss that is not finite" in use.line(None)


def test_what_a_task_of_somebodys_own_lacks_ends_the_measure_and_not_the_evaluation(caplog):
    class Model(Reader):
        def encoded(self, samples):
            return {**samples, "visual_tokens": samples["image"]}

    def held_out(samples):
        raise KeyError("captions")

    meter, samples = ImageUseMeter(10), batch([1.0, 3.0], ["a", "b"], [2, 4])
    for _ in range(2):
        assert "visual_tokens" not in samples or samples["visual_tokens"] is samples["image"]
        samples = meter.measure(Model(), samples, held_out)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "KeyError: 'captions'" in warning and "run.image_use_samples: 0" in warning
    assert meter.over_processes() is None


def test_without_texts_the_common_part_is_measured():
    class Model(Reader):
        def encoded(self, samples):
            return samples

    meter = ImageUseMeter(10)
    meter.measure(Model(), batch([1.0, 3.0], ["a", "b"], [2, 4]), lambda samples: None)
    use = meter.over_processes()
    assert use.common_fraction == pytest.approx(4.0 / 5.0)
    assert use.fields(None) == {"common_fraction": use.common_fraction}
    assert use.line(None) == "80.0 % of the soft prompts is common to all images"


def test_samples_without_a_reference_do_not_hide_the_others(tiny_project):
    cfg = Config.load(tiny_project())
    task = registry.get_task_class("captioning")(cfg.run)

    class FrameList:
        text_processor = None

        def references(self):
            return {"b": ["a dog", "two dogs"], "c": []}

    found = task.held_out({"image": torch.arange(3.0), "image_id": ["a", "b", "c"]}, FrameList())
    assert found["text_input"] == ["a dog"] and found["image"].tolist() == [1.0]

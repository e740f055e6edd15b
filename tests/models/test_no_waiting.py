"""Up to its gradients a training step waits for nothing on its device.

It is run on the ``meta`` device, whose tensors have no values: whatever looks at one on the way to the
gradients fails.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evlgen.common.registry import registry
from evlgen.config.config import load_model_file
from evlgen.config.run_config import RunConfig
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.models.language.hugging_face import for_each_text
from evlgen.tasks.captioning_scst import SelfCriticalCaptioningTask


class Copies(TorchDispatchMode):
    """Counts copies to another device that are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != found.device:
            self.waited_for += not (kwargs or {}).get("non_blocking")
        return found


@pytest.fixture
def model(golden):
    model = registry.get_model_class("evlgen_opt").from_config(
        load_model_file(golden / "evlgen_opt" / "model.yaml")
    )
    return model.train().to("meta")


IMAGES = torch.zeros(2, 3, 56, 56, device="meta")
TEXTS = ["a red circle", "a star", "two blue stars on a hill"]


@pytest.mark.parametrize(
    "texts",
    [
        {"text_input": TEXTS[:2]},
        {"text_input": TEXTS[:2], "text_output": TEXTS[1:]},
        {"text_input": TEXTS, "num_texts": [1, 2]},
        {"text_input": TEXTS, "num_texts": [1, 2], "text_weights": [0.5, 1.0, -2.0]},
        {"text_tokens": [[5, 6], [7], [8, 9, 10]], "num_texts": [1, 2], "text_weights": torch.ones(3)},
    ],
    ids=["captions", "questions", "captions of an image", "answers that weigh", "tokens"],
)
def test_losses_and_gradients_are_found_without_looking_at_a_value(model, texts):
    with Copies() as copies:
        losses = model({"image": IMAGES, **texts})
        losses["loss"].backward()
    assert copies.waited_for == 0
    assert isinstance(losses["num_tokens"], int)


class Captioned(BaseDataset):
    def references(self):
        return dict(enumerate(self.records))


def test_self_critical_training_waits_for_the_samples_only(model, monkeypatch):
    @contextlib.contextmanager
    def writing():
        with torch.no_grad():
            yield model

    task = SelfCriticalCaptioningTask(RunConfig(task="captioning_scst", max_epoch=1, scst_samples=2))
    task.before_training({"one": Captioned([["a circle"], ["a star"]])}, SimpleNamespace(writing=writing))
    monkeypatch.setattr(model, "generate_tokens", lambda *_, **__: [[5, 6], [7], [8, 9, 10], [11]])
    with Copies() as copies:
        losses = task.train_step(model, {"image": IMAGES, "image_id": [0, 1]})
        losses["loss"].backward()
    assert copies.waited_for == 0
    assert {value.device.type for name, value in losses.items() if name != "num_tokens"} == {"meta"}


def test_soft_prompts_of_each_text_are_found_without_looking_at_a_value():
    assert for_each_text(torch.empty(2, 3, 4, device="meta"), [1, 2]).shape == (3, 3, 4)
    prompts = torch.arange(4.0).view(2, 1, 2)
    assert for_each_text(prompts, [2, 0]).tolist() == [[[0, 1]], [[0, 1]]]

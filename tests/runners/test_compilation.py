"""`run.compile`: each kind of repeated block is compiled once, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from evlgen.common.registry import registry
from evlgen.config.config import load_model_file
from evlgen.config.run_config import RunConfig
from evlgen.runners.compilation import compile_blocks, repeated_blocks, uncompiled
from evlgen.runners.distribution import Distribution, make_accelerator


@pytest.fixture
def model(golden):
    cfg = load_model_file(golden / "evlgen_opt" / "model.yaml")
    return registry.get_model_class("evlgen_opt").from_config(OmegaConf.create(cfg)).train()


@pytest.fixture
def samples(golden):
    image = load_file(golden / "evlgen_opt" / "expected.safetensors")["image"]
    return {"image": image, "text_input": ["a red circle", "two blue stars on a hill", "a cat"]}


def loss_and_norms(model, samples) -> list[float]:
    model.zero_grad()
    loss = model(samples)["loss"]
    loss.backward()
    return [loss.item(), *(p.grad.norm().item() for p in model.parameters() if p.grad is not None)]


def test_each_kind_of_block_is_compiled_once_for_equal_losses(model, samples):
    fewer = {"image": samples["image"][:2], "text_input": ["a cat", "a longer text, on a hill in the rain"]}
    names = [*model.state_dict()]
    expected = [loss_and_norms(model, batch) for batch in (samples, fewer)]
    compiled: list[nn.Module] = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    blocks = compile_blocks(model, backend=backend)
    kinds = Counter(type(block).__name__ for block in blocks)
    assert kinds == {"EvaBlock": 3, "TomeFormerLayer": 3, "OPTDecoderLayer": 2}
    # batches, texts and, in a TomeFormer, tokens of each layer differ in length
    found = [loss_and_norms(model, batch) for batch in (samples, fewer)]
    assert len(compiled) == len(kinds)
    for ours, plain in zip(found, expected, strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)
    assert [*model.state_dict()] == names
    with uncompiled(blocks):
        assert loss_and_norms(model, samples) == pytest.approx(expected[0], rel=1e-5)
        assert not any(block._compiled_call_impl for block in blocks)
    assert len(compiled) == len(kinds)
    assert all(block._compiled_call_impl for block in blocks)


def test_blocks_are_the_innermost_lists_of_one_class():
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))

    stages = nn.Sequential(*(nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])}) for _ in range(2)))
    assert len(repeated_blocks(stages)) == 4
    assert not repeated_blocks(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])), "a layer is no block"
    assert not repeated_blocks(nn.ModuleList([block()])), "one block is not repeated"


def test_the_setting_compiles_in_training_and_not_while_texts_are_written(model):
    distribution = Distribution(
        make_accelerator(RunConfig(max_iters=1)), model, RunConfig(max_iters=1, compile=True)
    )
    assert len(distribution.compiled) == 8
    with distribution.generating():
        assert not any(block._compiled_call_impl for block in distribution.compiled)
    assert all(block._compiled_call_impl for block in distribution.compiled)
    plain = Distribution(make_accelerator(RunConfig(max_iters=1)), model, RunConfig(max_iters=1))
    assert not plain.compiled

"""Recomputed activations: the same gradients to the last bit, and less that is kept for the backward pass."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evlgen.common.errors import ConfigError
from evlgen.config.model_config import VisionConfig
from evlgen.models.vision import VisionEncoder, build_vision_encoder
from evlgen.models.vision.temporal import add_temporal_attention, temporal_modules

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 4}
NAMES = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "eva_clip_g"]
FRAMES = 4


def build(
    name: str = NAMES[0], grad_checkpoint: bool | str = False, temporal: str | None = None, **section
) -> VisionEncoder:
    """An encoder in training, with something to learn in it."""
    torch.manual_seed(0)
    section = {"freeze": temporal is not None, "precision": "fp32", "kwargs": SMALL, **section}
    cfg = VisionConfig(name, image_size=32, pretrained=False, grad_checkpoint=grad_checkpoint, **section)
    encoder = build_vision_encoder(cfg, temporal=temporal).requires_grad_(not cfg.freeze)
    for module in temporal_modules(encoder):
        module.num_frames = FRAMES
        torch.nn.init.constant_(module.alpha, 0.5)
        module.requires_grad_(True)
    return encoder.train(not cfg.freeze)


def videos(dtype: torch.dtype = torch.float32) -> Tensor:
    """Frames of two videos."""
    return torch.randn(2 * FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(encoder: VisionEncoder, autocast: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of a loss, and a random number drawn after it."""
    encoder.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tokens = encoder(videos(next(encoder.parameters()).dtype))
    tokens.float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return found, torch.rand(1)


def assert_same(one: tuple[dict[str, Tensor], Tensor], two: tuple[dict[str, Tensor], Tensor]) -> None:
    assert one[0].keys() == two[0].keys() and one[0]
    assert [name for name in one[0] if not torch.equal(one[0][name], two[0][name])] == []
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("grad_checkpoint", [True, "offload"])
@pytest.mark.parametrize("name", NAMES)
def test_all_weights_of_a_trained_encoder_get_the_same_gradients(name, grad_checkpoint):
    # with everything that draws random numbers: dropout, attention dropout, stochastic depth
    kwargs = {**SMALL, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
    section = {"drop_path_rate": 0.3, "kwargs": kwargs}
    with_checkpoints = build(name, grad_checkpoint, **section)
    expected = gradients(build(name, **section))
    assert set(expected[0]) == {n for n, _ in with_checkpoints.named_parameters()}
    assert_same(gradients(with_checkpoints), expected)


@pytest.mark.parametrize("grad_checkpoint", [True, "offload"])
def test_and_under_autocast(grad_checkpoint):
    assert_same(gradients(build(NAMES[2], grad_checkpoint), True), gradients(build(NAMES[2]), True))


@pytest.mark.parametrize("grad_checkpoint", [True, "offload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_temporal_attention_in_a_frozen_encoder_gets_the_same_gradients(name, precision, grad_checkpoint):
    section = {"temporal": "average", "precision": precision}
    expected = gradients(build(name, **section))
    assert all(".temporal_merge." in key for key in expected[0]) and len(expected[0]) == 6 * 5
    assert_same(gradients(build(name, grad_checkpoint, **section)), expected)


def gradients_of_lengths(encoder: VisionEncoder) -> tuple[dict[str, Tensor], Tensor]:
    """As `gradients`, of videos of several lengths: they are encoded one length after the other."""
    encoder.zero_grad()
    torch.manual_seed(3)
    frames, total = videos(), torch.zeros(())
    for num_frames in (4, 1, 2):
        for module in temporal_modules(encoder):
            module.train().num_frames = num_frames
        total = total + encoder(frames).float().square().sum()
    total.backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return found, torch.rand(1)


@pytest.mark.parametrize("grad_checkpoint", [True, "offload"])
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_videos_of_several_lengths_in_one_batch(name, freeze, grad_checkpoint):
    section = {"temporal": "average", "freeze": freeze}
    expected = gradients_of_lengths(build(name, **section))
    assert_same(gradients_of_lengths(build(name, grad_checkpoint, **section)), expected)


@pytest.mark.parametrize("temporal_first", [True, False])
def test_a_blocks_class_may_change_before_or_after(temporal_first):
    encoder = build()
    steps = [lambda: add_temporal_attention(encoder, "residual"), lambda: encoder.checkpoint(offload=False)]
    for step in steps if temporal_first else reversed(steps):
        step()
    plain = build()
    add_temporal_attention(plain, "residual")
    plain.load_state_dict(encoder.state_dict())
    for module in (*temporal_modules(encoder), *temporal_modules(plain)):
        module.num_frames = FRAMES
        torch.nn.init.constant_(module.alpha, 0.5)
    assert_same(gradients(encoder.train()), gradients(plain.train()))


def test_a_copy_computes_with_its_own_weights():
    encoder = build(grad_checkpoint=True)
    copied = copy.deepcopy(encoder)
    before = gradients(copied)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert_same(gradients(copied), before)


@pytest.mark.parametrize("grad_checkpoint", [True, "offload"])
@torch.no_grad()
def test_without_gradients_nothing_changes(grad_checkpoint):
    encoder = build(grad_checkpoint=grad_checkpoint)
    assert torch.equal(encoder(videos()), build()(videos()))
    assert kept_bytes(encoder) == 0


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what autograd keeps, every storage once; weights, which are there anyway, aside."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._tensors: list[Tensor] = []  # kept alive, so that no address is used again
        self.bytes = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._tensors.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def kept_bytes(encoder: VisionEncoder) -> int:
    kept = _Kept()
    with kept:
        encoder(videos())
    return kept.bytes


def test_less_than_half_is_kept():
    block_input = 2 * FRAMES * 17 * 32 * 4  # bytes
    pixels = videos().nbytes  # kept for the patch embedding where that is trained
    for section, beside in (({}, pixels), ({"temporal": "average"}, 0)):
        plain, recomputed = (kept_bytes(build(grad_checkpoint=c, **section)) for c in (False, True))
        assert recomputed < plain / 2
        # the inputs of six blocks and of the last norm, and the latter's means and deviations
        assert 7 * block_input < recomputed - beside < 7.2 * block_input


def test_offloaded_is_everything_that_is_kept(monkeypatch):
    offloaded = []
    save_on_cpu = torch.autograd.graph.save_on_cpu

    def watched(pin_memory):
        context = save_on_cpu(pin_memory)
        pack = context.pack_hook
        context.pack_hook = lambda tensor: offloaded.append(pack(tensor)) or offloaded[-1]
        return context

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", watched)
    encoder = build(grad_checkpoint="offload", temporal="average")
    assert kept_bytes(encoder) == 0  # beside the offloading
    inputs = [kept for _, kept in offloaded if kept.shape == (2 * FRAMES, 17, 32)]
    assert len(inputs) >= 6 and all(kept.device.type == "cpu" for _, kept in offloaded)


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made within it hold at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live:
                    self._live[key] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, key, None)
        self.bytes = max(self.bytes, sum(self._live.values()))
        return out


def peak_bytes(encoder: VisionEncoder) -> int:
    pixels = videos()
    with _Peak() as peak:
        encoder(pixels).square().sum().backward()
    return peak.bytes


def test_the_peak_of_a_whole_step_falls_by_more_than_half():
    """Recomputing holds one block's activations at a time, beside the inputs of all."""
    plain, recomputed = (peak_bytes(build(temporal="average", grad_checkpoint=c)) for c in (False, True))
    assert recomputed < plain / 2


@pytest.mark.parametrize(("grad_checkpoint", "whole"), [(True, True), ("offload", False)])
def test_it_is_traced_by_torch_compile(grad_checkpoint, whole):
    """In one graph; with offloading, which torch does not trace, in parts."""
    kwargs = {**SMALL, "depth": 2}
    encoder = build(grad_checkpoint=grad_checkpoint, kwargs=kwargs)
    encoder.forward = torch.compile(encoder.forward, backend="eager", fullgraph=whole)
    assert_same(gradients(encoder), gradients(build(kwargs=kwargs)))
    torch.compiler.reset()


def test_a_frozen_encoder_without_anything_to_learn_is_left_alone():
    for grad_checkpoint in (True, "offload"):
        encoder = build(grad_checkpoint=grad_checkpoint, freeze=True)
        assert not encoder.trunk.grad_checkpointing and not encoder.offloads


def test_models_that_cannot_are_named():
    with pytest.raises(ConfigError, match=r"model\.vision\.grad_checkpoint: timm's DLA cannot .* to false"):
        build("dla46_c", True, kwargs={})


def test_an_encoder_of_ones_own_that_cannot_is_named():
    class Own(VisionEncoder):
        pass

    with pytest.raises(ConfigError, match="Own does not recompute"):
        Own().checkpoint(offload=True)


# ---- by fairscale ----

FAIRSCALE = ["fairscale", "fairscale_offload"]


@pytest.fixture
def fairscale():
    pytest.importorskip("fairscale", reason="the extra fairscale is not installed")


@pytest.mark.parametrize("grad_checkpoint", FAIRSCALE)
@pytest.mark.parametrize("name", NAMES)
def test_fairscale_gives_the_same_gradients_in_float32(fairscale, name, grad_checkpoint):
    kwargs = {**SMALL, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
    section = {"drop_path_rate": 0.3, "kwargs": kwargs}
    assert_same(gradients(build(name, grad_checkpoint, **section)), gradients(build(name, **section)))


@pytest.mark.parametrize("grad_checkpoint", FAIRSCALE)
def test_fairscale_gives_temporal_attention_the_same_gradients_and_keeps_less(fairscale, grad_checkpoint):
    plain = build(temporal="average")
    wrapped = build(grad_checkpoint=grad_checkpoint, temporal="average")
    assert_same(gradients_of_lengths(wrapped), gradients_of_lengths(plain))
    assert_same(gradients(wrapped), gradients(plain))
    assert kept_bytes(wrapped) < kept_bytes(plain) / 2


def test_where_fairscale_would_give_wrong_gradients_it_is_refused(fairscale):
    encoder = build(grad_checkpoint="fairscale_offload")
    with pytest.raises(ConfigError, match="computes again without autocast"):
        gradients(encoder, autocast=True)
    with pytest.raises(ConfigError, match="a copied or changed block"):
        gradients(copy.deepcopy(encoder))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(encoder)(videos()), build()(videos()))
    encoder.trunk.blocks[2].requires_grad_(False)
    with pytest.raises(ConfigError, match="no gradient passes a block without trained weights"):
        gradients(encoder)
    add_temporal_attention(encoder, "residual")
    with pytest.raises(ConfigError, match="a copied or changed block"):
        gradients(encoder)


def test_fairscale_wraps_the_blocks_of_plain_transformers_alone(fairscale):
    with pytest.raises(ConfigError, match="has no such blocks. Set it to true or offload"):
        build("resnet18", "fairscale", kwargs={})

"""Activation checkpointing: blocks keep their input alone and are computed again in the backward pass.

By torch's non-reentrant checkpoint, which timm's models call for each block, or by fairscale's
``checkpoint_wrapper``, as in LAVIS. The latter (0.4.13) has faults, of which those that would give wrong
gradients are refused (`FairscaleCheckpoints`): it computes again without autocast on a CPU and in float16 on
a GPU, whatever type the forward pass ran in; inputs it offloads from a GPU lose their ``requires_grad``, so
that a block without trained weights stops the gradient; a copy of a wrapped block runs the original, and one
whose class is changed later runs as before. `torch.autograd.grad` and `torch.compile` do not get through it.

timm calls ``checkpoint(block, x)``, the block as it is at that moment, so with torch's it makes no difference
whether a block is copied, or its class changed, before or after.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
import weakref

import torch
from torch import nn

from evlgen.common.errors import ConfigError


def checkpoint_blocks(trunk: nn.Module) -> None:
    """Has a timm model's blocks computed again in the backward pass, random numbers and autocast as in the
    forward pass. Where no gradients are asked for nothing changes.

    Raises:
        ConfigError: the model does not offer it.
    """
    try:
        trunk.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            f"model.vision.grad_checkpoint: timm's {type(trunk).__name__} cannot recompute its activations. "
            "Set it to false."
        ) from error


def offloaded(device: torch.device) -> contextlib.AbstractContextManager:
    """Within the context, what the backward pass needs is kept in the CPU's memory, pinned where the model
    is on a GPU. Around checkpointed blocks that is their inputs."""
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")


class FairscaleCheckpoints:
    """A timm transformer's blocks, each in fairscale's ``checkpoint_wrapper``.

    Args:
        trunk: the timm model, its blocks as they stay.
        offload: keep the blocks' inputs in the CPU's memory.

    Raises:
        ConfigError: fairscale is not installed; the model has no list of blocks.
    """

    def __init__(self, trunk: nn.Module, offload: bool) -> None:
        if importlib.util.find_spec("fairscale") is None:
            raise ConfigError(
                "model.vision.grad_checkpoint: fairscale is not installed. Install it with "
                '`pip install "evlgen[fairscale]"`, or set it to true or offload: by torch.'
            )
        from fairscale.nn.checkpoint import checkpoint_wrapper

        blocks = getattr(trunk, "blocks", None)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList):
            raise ConfigError(
                "model.vision.grad_checkpoint: fairscale wraps the blocks of a plain vision transformer, and "
                f"timm's {type(trunk).__name__} has no such blocks. Set it to true or offload: by torch."
            )
        # of the first block in a frozen encoder, which gets its gradients all the same
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", module="fairscale")
        self.offload = offload
        self._wrapped = [(weakref.ref(block), type(block)) for block in blocks]
        for block in blocks:
            checkpoint_wrapper(block, offload_to_cpu=offload)

    def check(self, trunk: nn.Module, device: torch.device) -> None:
        """Before a forward pass: raises `ConfigError` where gradients would be wrong."""
        if not torch.is_grad_enabled():
            return
        if torch.is_autocast_enabled(device.type):
            raise ConfigError(
                "model.vision.grad_checkpoint: fairscale computes again without autocast, so gradients would "
                "be off. Set it to true or offload: by torch; or run.precision: fp32."
            )
        for (wrapped, kind), block in zip(self._wrapped, trunk.blocks, strict=True):
            if wrapped() is not block or kind is not type(block):
                raise ConfigError(
                    "model.vision.grad_checkpoint: a copied or changed block runs as the one that fairscale "
                    "wrapped. Build the model again, or set it to true or offload: by torch."
                )
            if self.offload and not any(p.requires_grad for p in block.parameters()):
                raise ConfigError(
                    "model.vision.grad_checkpoint: with inputs offloaded by fairscale, no gradient passes a "
                    "block without trained weights. Set it to fairscale or offload."
                )

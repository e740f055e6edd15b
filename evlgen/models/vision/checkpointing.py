"""Activation checkpointing: blocks keep their input alone and are computed again in the backward pass.

By torch's non-reentrant checkpoint, which timm's models call for each block, and not by fairscale's wrapper.
The latter (0.4.13) computes again without autocast on a CPU and in float16 on a GPU, whatever type the
forward pass ran in, so gradients under bfloat16 autocast are off by a percent; inputs it offloads from a GPU
lose their ``requires_grad``, so a block without trained weights stops the gradient; copies of a wrapped block
run the original; `torch.autograd.grad` and `torch.compile` do not get through it.

timm calls ``checkpoint(block, x)``, the block as it is at that moment, so it makes no difference whether a
block's class is changed before or after.
"""

from __future__ import annotations

import contextlib

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

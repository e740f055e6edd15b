"""Regional compilation: the repeated blocks of a model, each kind compiled once.

A transformer is one block many times over. Compiled as a whole, its code grows with its depth: the published
model was not ready after two minutes. Compiled block by block, the second block runs the code of the first.
Sizes that change, the batch and in a TomeFormer the tokens of each layer, are variables of that code.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence

from torch import nn

logger = logging.getLogger(__name__)


def compile_blocks(
    model: nn.Module, apart: Collection[nn.Module] = (), backend: str = "inductor"
) -> list[nn.Module]:
    """Has `repeated_blocks` compiled, in place, when they are first called. Weights, names and checkpoints
    stay as they are.

    Args:
        apart: modules that stay as they are.
        backend: of `torch.compile`.

    Returns:
        the blocks.
    """
    blocks = [block for block in repeated_blocks(model) if block not in apart and not _is_wrapped(block)]
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
    kinds = ", ".join(sorted({type(block).__name__ for block in blocks})) or "none"
    logger.info("%d blocks are compiled when they are first called, each kind once: %s", len(blocks), kinds)
    return blocks


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of all lists of several modules of one class, the innermost lists whose members have two
    linear layers or more."""
    found: list[nn.Module] = []
    for child in model.children():
        found += repeated_blocks(child)
    if found or not isinstance(model, nn.ModuleList | nn.Sequential):
        return found
    members = [*model]
    is_repeated = len(members) > 1 and len({type(member) for member in members}) == 1
    return members if is_repeated and _num_linear(members[0]) > 1 else []


@contextlib.contextmanager
def uncompiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, compiled blocks run as they were written."""
    compiled = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = call


def _num_linear(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Linear) for part in module.modules())


def _is_wrapped(block: nn.Module) -> bool:
    """Whether a block's forward was replaced, as fairscale does: `torch.compile` does not get through it."""
    return "forward" in vars(block)

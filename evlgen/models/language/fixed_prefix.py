"""A prefix and its branches in tensors of fixed shapes, so that every token is the same work.

`prefixes.SharedPrefix` grows by a token at each step. Here a mask says what has been written already, and the
places of the next tokens are numbers in a tensor: on a CUDA device a step is then recorded once for each
shape and launched as one (`ops.cuda_graphs`). Rows and lengths are rounded up, so that few shapes occur.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from evlgen.models.language.prefixes import Prefix, SharedPrefix, branch_rows, cache_name
from evlgen.models.language.soft_prompt_merging import merges_soft_prompts
from evlgen.models.ops import cuda_graphs

_LEAST_TOKENS = 8  # of a text: recording takes as long as a few tokens do without


@contextlib.contextmanager
def prefix_behind(
    model: PreTrainedModel, embeds: Tensor, mask: Tensor, branches: int, max_length: int
) -> Iterator[Prefix]:
    """The sequences read by a model that can read trees, in the form that is fastest on their device; for use
    inside the block. Arguments as of `SharedPrefix`."""
    if max_length < _LEAST_TOKENS or merges_soft_prompts(model):  # where they stand decides the work
        yield SharedPrefix(model, embeds, mask, branches, max_length)
        return
    shape = fixed_shape(embeds, branches, max_length)

    def make() -> FixedShapes:
        shapes = FixedShapes(model, embeds, *shape)
        shapes.fill(embeds, mask)
        return shapes

    with cuda_graphs.recorded(model, embeds.device, (shape, embeds.dtype), make) as shapes:
        if shapes is None:
            yield SharedPrefix(model, embeds, mask, branches, max_length)
        else:
            yield FixedPrefix(shapes, embeds, mask)


def fixed_shape(embeds: Tensor, branches: int, max_length: int) -> tuple[int, int, int, int]:
    """Rows, tokens of the prefix, branches and tokens of a branch, rounded up."""
    rows, width, _ = embeds.shape
    return _rounded(rows, 1), _rounded(width, 16), branches, _rounded(max_length, 16)


def _rounded(size: int, least: int) -> int:
    """Up to a multiple of an eighth of the next power of two, and of ``least``: by less than a quarter, of
    large sizes."""
    step = max(least, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


class FixedShapes:
    """The tensors of one shape, and what is computed over them.

    Args:
        embeds: of the type and on the device that the model reads.
        rows, width, branches, length: see `fixed_shape`.
    """

    def __init__(
        self, model: PreTrainedModel, embeds: Tensor, rows: int, width: int, branches: int, length: int
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=embeds.device)

        room = width + branches * length
        self.width, self.branches = width, branches
        # read by `run_prefix`
        self.embeds = zeros(rows, width, embeds.shape[2], dtype=embeds.dtype)
        self.mask = zeros(rows, width, dtype=torch.bool)  # False: padding
        # read by `run_tokens`
        self.tokens = zeros(rows, branches)
        self.parents = zeros(rows, branches)  # the branch that each token continues
        # kept from one call to the next
        self.positions = zeros(rows, branches)  # of the next tokens
        self.slots = zeros(branches)  # where their keys and values go
        self.visible = zeros(rows, branches, room, dtype=torch.bool)
        self.layers = [
            _FixedLayer(room, self.slots)
            for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers)
        ]
        self.cache = {cache_name(model): Cache(self.layers)}
        # results: [rows, 1, vocabulary] behind the prefix, [rows, branches, vocabulary] behind a token
        self.prefix_logits = self.token_logits = embeds.new_empty(0)
        # the model is in these alone: what is recorded does not keep it alive
        self.run_prefix: Callable[[], None] = partial(self._read_prefix, model)
        self.run_tokens: Callable[[], None] = partial(self._read_tokens, model)

    def functions(self) -> list[Callable[[], None]]:
        return [self.run_prefix, self.run_tokens]

    def play(self, functions: list[Callable[[], None]]) -> None:
        self.run_prefix, self.run_tokens = functions

    @property
    def num_bytes(self) -> int:
        kept = [self.embeds, self.visible, self.prefix_logits, self.token_logits]
        kept += [states for layer in self.layers for states in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def fill(self, embeds: Tensor, mask: Tensor) -> None:
        """Puts sequences [B, P, C] and their mask [B, P] in place, padded at their start; the last one fills
        the rows behind them."""
        count, missing = len(embeds), self.width - embeds.shape[1]
        self.embeds[:count] = F.pad(embeds, (0, 0, missing, 0))
        self.mask[:count] = F.pad(mask.to(self.mask.device, torch.bool), (missing, 0))
        for tensor in (self.embeds, self.mask):
            tensor[count:] = tensor[count - 1]

    def _read_prefix(self, model: PreTrainedModel) -> None:
        """Reads the sequences; whatever was read before is forgotten."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # [rows, width]
        everything = torch.ones(self.width, self.width, dtype=torch.bool, device=self.mask.device)
        # padding sees itself: scores of which all are hidden have no softmax in float16
        visible = (everything.tril() & self.mask[:, None]) | everything.tril().triu()
        logits = self._run(
            model,
            False,
            inputs_embeds=self.embeds,
            attention_mask=self._additive(visible),
            position_ids=positions,
            logits_to_keep=1,
        )
        if self.prefix_logits.shape != logits.shape:  # the first time
            self.prefix_logits = torch.zeros_like(logits)
        self.prefix_logits.copy_(logits)
        self.positions.copy_(positions[:, -1:] + 1)
        torch.arange(self.width, self.width + self.branches, out=self.slots)
        self.visible.zero_()
        self.visible[:, :, : self.width] = self.mask[:, None]

    def _read_tokens(self, model: PreTrainedModel) -> None:
        """Reads one more token in each branch."""
        self.visible.copy_(branch_rows(self.visible, self.parents))
        self.visible.scatter_(2, self.slots[:, None].expand(len(self.tokens), -1, -1), True)
        logits = self._run(
            model,
            True,
            input_ids=self.tokens,
            attention_mask=self._additive(self.visible),
            position_ids=self.positions,
        )
        if self.token_logits.shape != logits.shape:  # the first time
            self.token_logits = torch.zeros_like(logits)
        self.token_logits.copy_(logits)
        self.positions.add_(1)
        self.slots.add_(self.branches)

    def _run(self, model: PreTrainedModel, by_slot: bool, **inputs: Tensor | int) -> Tensor:
        for layer in self.layers:
            layer.by_slot = by_slot
        return model(**inputs, use_cache=True, **self.cache).logits

    def _additive(self, visible: Tensor) -> Tensor:
        """[rows, queries, keys] -> a mask that is added to scores, the same for all heads: [rows, 1, queries,
        keys]."""
        hidden = torch.finfo(self.embeds.dtype).min
        return torch.zeros_like(visible, dtype=self.embeds.dtype).masked_fill_(~visible, hidden)[:, None]


class FixedPrefix:
    """A `prefixes.Prefix` in fixed shapes, over the tensors of which nobody else works meanwhile.

    Args:
        embeds: [B, P, C].
        mask: [B, P], on the CPU: 0 for padding.
    """

    def __init__(self, shapes: FixedShapes, embeds: Tensor, mask: Tensor) -> None:
        self.shapes, self.count = shapes, len(embeds)
        shapes.fill(embeds, mask)
        shapes.run_prefix()
        self.logits = shapes.prefix_logits[: self.count]
        self.next_position = shapes.positions[: self.count]
        self.own = torch.arange(shapes.branches, device=embeds.device)

    def read(self, tokens: Tensor, branches: Tensor | None = None) -> Tensor:
        """As `Prefix.read`; the logits are good until the next call."""
        self.shapes.tokens[: self.count] = tokens
        self.shapes.parents[: self.count] = self.own if branches is None else branches
        self.shapes.run_tokens()
        return self.shapes.token_logits[: self.count]


class _FixedLayer(DynamicLayer):
    """Keys and values of one layer: those of a prefix at its start, those of tokens in the slots named."""

    def __init__(self, room: int, slots: Tensor) -> None:
        super().__init__()
        self.room, self.slots, self.by_slot = room, slots, False
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # zeros, as what is hidden is multiplied by 0 all the same
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.room, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.by_slot:
            self.length = key_states.shape[2]
            self.keys[:, :, : self.length] = key_states
            self.values[:, :, : self.length] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length if self.by_slot else 0

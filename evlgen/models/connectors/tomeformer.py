"""TomeFormer: a BERT encoder that merges similar visual tokens layer by layer.

Jian et al., *Expedited Training of Visual Conditioned Language Generation via Redundancy Reduction*, ACL 2024
(arXiv 2310.03291), section 3. Published setting: BERT-base weights, 12 layers, r = 19, so 257 tokens become
29.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evlgen.common.errors import ConfigError
from evlgen.common.memory import check_fits
from evlgen.common.registry import registry
from evlgen.config.schema import AtLeast, Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from evlgen.models.connectors.base import Connector, ConnectorInputs
from evlgen.models.connectors.bert_weights import BertSizes, bert_sizes, load_bert_layers
from evlgen.models.connectors.projection import count_frames, start_at_scale
from evlgen.models.ops import Dropout, self_attention
from evlgen.models.token_merging import (
    compose_maps,
    limit_r,
    match_tokens,
    merge_mean,
    merge_schedule,
    merge_weighted_mean,
    token_counts,
    token_sizes,
)

_BESIDE_RESIDUAL = 0.2  # of the layers' part of the soft prompts at the start


class TomeFormerLayer(nn.Module):
    """One post-norm BERT layer with merging between its attention and its feed-forward block.

    Args:
        sizes: of the BERT.
        merge, proportional_attention: see `TomeFormer`.
    """

    def __init__(self, sizes: BertSizes, merge: str = "mean", proportional_attention: bool = False) -> None:
        super().__init__()
        self.weighs_by_size = merge == "size_weighted"
        self.proportional_attention = proportional_attention
        width = sizes.hidden_size
        self.num_heads = sizes.num_attention_heads
        self.attention_dropout = sizes.attention_probs_dropout_prob
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
        self.up = nn.Linear(width, sizes.intermediate_size)
        self.down = nn.Linear(sizes.intermediate_size, width)
        self.out_norm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
        self.dropout = Dropout(sizes.hidden_dropout_prob)

    def forward(
        self, x: Tensor, r: int, num_protected: int, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, N, C] -> [B, N - r, C] and the merge map [B, N] (None where nothing merged).

        Args:
            r, num_protected: see `match_tokens`.
            counts: [B, N], how many visual tokens each token stands for; None: one each.
        """
        qkv = self.qkv(x)  # [B, N, 3 C]
        dropout = self.attention_dropout if self.training else 0.0
        if counts is not None and self.proportional_attention:
            attended = proportional_attention(qkv, self.num_heads, counts, dropout)
        else:
            attended = self_attention(qkv, self.num_heads, dropout)
        x = self.attention_norm(x + self.dropout(self.attention_out(attended)))
        merge_map = None
        if r > 0:
            metric = qkv.detach().unflatten(-1, (3, self.num_heads, -1))[:, :, 1].mean(2)  # of the keys
            merge_map, num_out = match_tokens(metric, r, num_protected)
            if self.weighs_by_size:
                x = merge_weighted_mean(x, counts, merge_map, num_out)
            else:
                x = merge_mean(x, merge_map, num_out)
        return self.out_norm(x + self.dropout(self.down(F.gelu(self.up(x))))), merge_map


def proportional_attention(qkv: Tensor, num_heads: int, counts: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention in which a merged token weighs as all the tokens it stands for would: the logarithm
    of their number is added to the logits (ToMe paper, section 3, equation 1).

    Args:
        qkv: [B, N, 3 C]: queries, keys and values, the C channels of each split over the heads.
        counts: [B, N], how many tokens each token stands for.
        dropout: probability of dropping an attention weight; 0 outside of training.

    Returns:
        [B, N, C].
    """
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
    exact = torch.promote_types(qkv.dtype, torch.float32)
    bias = counts.to(exact).log().to(qkv.dtype)[:, None, None, :]  # of the keys
    return F.scaled_dot_product_attention(q, k, v, bias, dropout).transpose(1, 2).flatten(2)


@functools.cache
def _stretching(size: tuple[int, ...], new_size: tuple[int, ...]) -> Tensor:
    """The matrix [new positions, positions] of linear interpolation over a line or a grid. A product with it
    has a gradient that is the same every time, which torch's own interpolation has not on a GPU."""
    count = math.prod(size)
    mode = "linear" if len(size) == 1 else "bilinear"
    each = torch.eye(count).view(1, count, *size)
    return F.interpolate(each, new_size, mode=mode, align_corners=True).flatten(2)[0].T


@registry.register_connector("tomeformer")
class TomeFormer(Connector):
    """Linear(vision_dim -> hidden), BERT layers that each merge r pairs of tokens, Linear(hidden ->
    language_dim).

    Args:
        inputs: what it stands between, see `ConnectorInputs`.
        num_layers: BERT layers.
        r: pairs of tokens merged in each layer; a list with one number per layer; or ``[r, inflection]``
            (`token_merging.merge_schedule`).
        merge: ``mean``, of the tokens that merge, each an equal share, as published; or ``size_weighted``,
            each by the number of visual tokens it stands for, so that a soft prompt is a mean over all of
            its visual tokens.
        proportional_attention: a token is attended to in proportion to the number of visual tokens it
            stands for (`proportional_attention`).
        residual: a soft prompt also gets Linear(vision_dim -> language_dim) of the mean of the visual tokens
            that merged into it, which the layers add to: at the start five times as much as theirs (what was
            measured with it: docs/training-on-real-parts.md).
        init: hub id or folder of a BERT whose layers the connector starts from (its sizes are then the
            connector's); None starts from random weights of the sizes below.
        init_lr_scale: factor on the learning rate of what starts from ``init``.
        hidden_size, num_attention_heads, intermediate_size, max_position_embeddings: BERT's sizes, by default
            BERT-base's, or those of ``init``.
        hidden_dropout_prob, attention_probs_dropout_prob: dropouts, by default ``init``'s, else 0.1.
    """

    def __init__(
        self,
        inputs: ConnectorInputs,
        num_layers: PositiveInt = 12,
        r: NonNegativeInt | list[Annotated[int | float, AtLeast(-1)]] = 19,
        merge: Literal["mean", "size_weighted"] = "mean",
        proportional_attention: bool = False,
        residual: bool = False,
        init: str | None = None,
        init_lr_scale: PositiveFloat = 1.0,
        hidden_size: PositiveInt | None = None,
        num_attention_heads: PositiveInt | None = None,
        intermediate_size: PositiveInt | None = None,
        max_position_embeddings: PositiveInt | None = None,
        hidden_dropout_prob: Fraction | None = None,
        attention_probs_dropout_prob: Fraction | None = None,
        layer_norm_eps: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        sizes = bert_sizes(
            init,
            num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=max_position_embeddings,
            hidden_dropout_prob=hidden_dropout_prob,
            attention_probs_dropout_prob=attention_probs_dropout_prob,
            layer_norm_eps=layer_norm_eps,
        )
        width = sizes.hidden_size
        check_fits(
            sizes.num_weights(num_layers) + width * (inputs.vision_dim + inputs.language_dim),
            "model.connector",
        )
        self.r = merge_schedule(r, num_layers)
        self.num_tokens, self.num_prefix_tokens = inputs.num_tokens, inputs.num_prefix_tokens
        self.num_protected = min(inputs.num_prefix_tokens, 1)
        self.counts_tokens = proportional_attention or merge == "size_weighted"
        self.init_lr_scale = init_lr_scale if init is not None else 1.0
        self.proj_in = nn.Linear(inputs.vision_dim, width)
        self.positions = nn.Embedding(sizes.max_position_embeddings, width)
        self.token_types = nn.Embedding(2, width)
        self.input_norm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
        self.dropout = Dropout(sizes.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            TomeFormerLayer(sizes, merge, proportional_attention) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(width, inputs.language_dim)
        self.proj_residual = (
            nn.Linear(inputs.vision_dim, inputs.language_dim, bias=False) if residual else None
        )
        self._initialise(init, inputs.embedding_rms)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> soft prompts [B, M, language_dim]."""
        if self.proj_residual is not None:
            return self.forward_details(tokens)["soft_prompts"]
        x, counts = self._embed(tokens), None
        for layer, r in zip(self.layers, self.r, strict=True):
            x, layer_map = layer(x, r, self.num_protected, counts)
            counts = self._count(counts, layer_map, x.shape[1])
        return self.proj_out(x)

    def forward_details(self, tokens: Tensor) -> dict[str, Any]:
        """The forward pass with its insides, for images and tests.

        Returns:
            ``soft_prompts`` [B, M, language_dim]; ``hidden_states``: after the embeddings, then after each
            layer;
            ``merge_map`` [B, N]: the soft prompt each visual token ended in; ``layer_maps``: the same after
            each layer; ``token_counts`` [B, M]: how many visual tokens each soft prompt stands for.
        """
        x, counts = self._embed(tokens), None
        hidden_states, layer_maps = [x], []
        merge_map = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        for layer, r in zip(self.layers, self.r, strict=True):
            x, layer_map = layer(x, r, self.num_protected, counts)
            counts = self._count(counts, layer_map, x.shape[1])
            hidden_states.append(x)
            if layer_map is not None:
                merge_map = compose_maps(merge_map, layer_map)
            layer_maps.append(merge_map)
        soft_prompts = self.proj_out(x)
        if self.proj_residual is not None:
            soft_prompts = soft_prompts + self.proj_residual(merge_mean(tokens, merge_map, x.shape[1]))
        return {
            "soft_prompts": soft_prompts,
            "hidden_states": hidden_states,
            "merge_map": merge_map,
            "layer_maps": layer_maps,
            "token_counts": token_counts(merge_map, x.shape[1]),
        }

    def lr_scales(self) -> dict[str, float]:
        parts = ("positions", "token_types", "input_norm", "layers")
        return {} if self.init_lr_scale == 1.0 else dict.fromkeys(parts, self.init_lr_scale)

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M for N visual tokens."""
        for r in self.r:
            num_tokens -= limit_r(num_tokens, r, self.num_protected)
        return num_tokens

    def _count(self, counts: Tensor | None, layer_map: Tensor | None, num_out: int) -> Tensor | None:
        """How many visual tokens each token stands for after a layer, where an option asks for it."""
        if not self.counts_tokens or layer_map is None:
            return counts
        return token_sizes(counts, layer_map, num_out)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.proj_in(tokens)
        x = x + self.token_types.weight[0] + self._position_table(x.shape[1])
        return self.dropout(self.input_norm(x))

    def _position_table(self, num_tokens: int) -> Tensor:
        """[num_tokens, C]; more tokens than positions stretch the table: bilinearly over the token grid of
        an image, linearly along the frames that stand in a row.

        Raises:
            ConfigError: more tokens than positions, and no square grid to stretch the table over.
        """
        table = self.positions.weight
        if num_tokens <= len(table):
            return table[:num_tokens]
        prefix = min(self.num_prefix_tokens, len(table))
        side, known = math.isqrt(num_tokens - prefix), math.isqrt(len(table) - prefix)
        if count_frames(num_tokens, self.num_tokens) > 1:
            used, weights = table[prefix:], _stretching((len(table) - prefix,), (num_tokens - prefix,))
        elif side * side == num_tokens - prefix and known:
            used, weights = table[prefix : prefix + known**2], _stretching((known, known), (side, side))
        else:
            raise ConfigError(
                f"model.connector: {num_tokens} visual tokens are more than the {len(table)} positions, and "
                "without a square grid to stretch these over. Use square images, or set init: null and "
                f"max_position_embeddings: {num_tokens}."
            )
        return torch.cat([table[:prefix], weights.to(table) @ used])

    @torch.no_grad()
    def _initialise(self, init: str | None, embedding_rms: float | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # BERT's initialiser
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if init is not None:
            load_bert_layers(self, init)
        if embedding_rms is not None:
            # what reaches proj_out is layer-normalised, so this gives soft prompts of the word embeddings'
            # scale
            if self.proj_residual is not None:
                start_at_scale(self.proj_residual, embedding_rms)
                embedding_rms *= _BESIDE_RESIDUAL
            start_at_scale(self.proj_out, embedding_rms)

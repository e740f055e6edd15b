"""The Q-Former: learned queries that read the visual tokens through a BERT with cross-attention.

Li et al., *BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models*, 2023 (arXiv 2301.12597), section 3.1. Published setting: BERT-base weights, 12 layers, 32 queries,
cross-attention in every second layer. What reads and writes text in the first stage stands in
`evlgen.models.connectors.qformer_text`, and shares the self-attention of the layers here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evlgen.common.memory import check_fits
from evlgen.common.registry import registry
from evlgen.config.schema import Fraction, PositiveFloat, PositiveInt
from evlgen.models.connectors.base import Connector, ConnectorInputs
from evlgen.models.connectors.bert_weights import BertSizes, bert_sizes
from evlgen.models.connectors.projection import start_at_scale
from evlgen.models.connectors.qformer_weights import load_bert
from evlgen.models.ops import Dropout, self_attention

INITIALISER_STD = 0.02  # BERT's


def attention(
    q: Tensor, kv: Tensor, num_heads: int, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention.

    Args:
        q: [B, M, C], the C channels split over the heads.
        kv: [B, N, 2 C]: keys and values.
        dropout: probability of dropping an attention weight; 0 outside of training.
        mask: true where a query sees a key, broadcast to [B, heads, M, N]; None: everywhere.

    Returns:
        [B, M, C].
    """
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, M, d]
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


class _FeedForward(nn.Module):
    """BERT's post-norm feed-forward block."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.down = nn.Linear(sizes.intermediate_size, sizes.hidden_size)
        self.out_norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)
        self.dropout = Dropout(sizes.hidden_dropout_prob)

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.out_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class FeedForward(_FeedForward):
    """The feed-forward block of the text, beside that of the queries in each layer."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.feed_forward(x)


class QFormerLayer(_FeedForward):
    """One post-norm BERT layer: self-attention, cross-attention to the visual tokens, feed-forward.

    Args:
        sizes: of the BERT.
        vision_dim: channels of the visual tokens; None for a layer without cross-attention.
    """

    def __init__(self, sizes: BertSizes, vision_dim: int | None) -> None:
        super().__init__(sizes)
        width = sizes.hidden_size
        self.num_heads = sizes.num_attention_heads
        self.attention_dropout = sizes.attention_probs_dropout_prob
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
        self.has_cross_attention = vision_dim is not None
        if vision_dim is not None:
            self.cross_query = nn.Linear(width, width)
            self.cross_key_value = nn.Linear(vision_dim, 2 * width)
            self.cross_out = nn.Linear(width, width)
            self.cross_norm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)

    def forward(self, x: Tensor, visual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries [B, M, C] and keys and values of the visual tokens -> [B, M, C], and the queries' own keys
        and values [B, M, 2 C]."""
        x, kv = self.attend(x)
        return self.feed_forward(self.cross_attend(x, visual)), kv

    def attend(
        self, x: Tensor, past: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The self-attention block.

        Args:
            x: [B, N, C].
            past: keys and values of what stands before ``x``, [B, P, 2 C].
            mask: true where a token sees another, broadcast to [B, heads, N, P + N]; None: everywhere.

        Returns:
            [B, N, C]; keys and values of all that was seen, [B, P + N, 2 C].
        """
        qkv = self.qkv(x)  # [B, N, 3 C]
        q, kv = qkv.split([x.shape[-1], 2 * x.shape[-1]], dim=-1)
        if past is not None:
            kv = torch.cat([past, kv], dim=1)
        if past is None and mask is None:
            attended = self_attention(qkv, self.num_heads, self._attention_dropout())
        else:
            attended = attention(q, kv, self.num_heads, self._attention_dropout(), mask)
        return self.attention_norm(x + self.dropout(self.attention_out(attended))), kv

    def cross_attend(self, x: Tensor, visual: Tensor | None) -> Tensor:
        """The cross-attention block, [B, M, C] -> [B, M, C]; nothing in a layer that has none.

        Args:
            visual: ``cross_key_value`` of the visual tokens, [B, N, 2 C]; None where a layer has none.
        """
        if visual is None:
            return x
        attended = attention(self.cross_query(x), visual, self.num_heads, self._attention_dropout())
        return self.cross_norm(x + self.dropout(self.cross_out(attended)))

    def _attention_dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0


@registry.register_connector("qformer")
class QFormer(Connector):
    """Learned queries, BERT layers in which they attend to each other and to the visual tokens, and
    Linear(hidden -> language_dim).

    Args:
        inputs: what it stands between, see `ConnectorInputs`. Without a language model (the first
            stage) the last projection is left out.
        num_query_token: queries, and so soft prompts.
        num_layers: BERT layers.
        cross_attention_freq: the first of each so many layers has cross-attention.
        init: hub id or folder of a BERT whose layers the connector starts from (its sizes are then the
            connector's), the queries' feed-forward blocks as copies of the text's; cross-attention and
            queries start at random. None starts from random weights of the sizes below.
        init_lr_scale: factor on the learning rate of what starts from ``init``.
        hidden_size, num_attention_heads, intermediate_size: BERT's sizes, by default BERT-base's, or those of
            ``init``.
        hidden_dropout_prob, attention_probs_dropout_prob: dropouts, by default ``init``'s, else 0.1.
    """

    #: Weights of the first stage that a second stage has no use for: heads.
    SPARE_WEIGHTS: ClassVar[tuple[str, ...]] = ("vision_proj.", "text_proj.", "itm_head.", "temp.")
    #: And what reads and writes text, where a checkpoint is known by all of these to be of a first stage:
    #: InstructBLIP's Q-Former reads the question, and would not be itself without.
    SPARE_TEXT: ClassVar[tuple[str, ...]] = ("text.",)
    FIRST_STAGE: ClassVar[tuple[str, ...]] = ("itm_head.", "vision_proj.", "temp.")

    def __init__(
        self,
        inputs: ConnectorInputs,
        num_query_token: PositiveInt = 32,
        num_layers: PositiveInt = 12,
        cross_attention_freq: PositiveInt = 2,
        init: str | None = None,
        init_lr_scale: PositiveFloat = 1.0,
        hidden_size: PositiveInt | None = None,
        num_attention_heads: PositiveInt | None = None,
        intermediate_size: PositiveInt | None = None,
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
            hidden_dropout_prob=hidden_dropout_prob,
            attention_probs_dropout_prob=attention_probs_dropout_prob,
            layer_norm_eps=layer_norm_eps,
        )
        self.sizes, self.init = sizes, init
        self.init_lr_scale = init_lr_scale if init is not None else 1.0
        self.num_query_token = num_query_token
        width = sizes.hidden_size
        num_cross = -(-num_layers // cross_attention_freq)
        check_fits(
            sizes.num_weights(num_layers)
            + num_cross * 2 * width * (width + inputs.vision_dim)
            + width * (num_query_token + inputs.language_dim),
            "model.connector",
        )
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, width))
        self.input_norm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
        self.dropout = Dropout(sizes.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            QFormerLayer(sizes, None if index % cross_attention_freq else inputs.vision_dim)
            for index in range(num_layers)
        )
        self.proj_out = nn.Linear(width, inputs.language_dim) if inputs.language_dim else None
        self._initialise(init, inputs.embedding_rms)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> soft prompts [B, M, language_dim]; without a projection [B, M, hidden]."""
        x, _ = self.read(self.keys_values(tokens), len(tokens))
        return self.project(x)

    def project(self, queries: Tensor) -> Tensor:
        """What the layers made of the queries, [B, M, hidden], as soft prompts, [B, M, language_dim]."""
        return queries if self.proj_out is None else self.proj_out(queries)

    def keys_values(self, tokens: Tensor) -> list[Tensor | None]:
        """What each layer's cross-attention reads of the visual tokens [B, N, vision_dim], which is the same
        for whoever asks: [B, N, 2 hidden], None for a layer without cross-attention."""
        return [layer.cross_key_value(tokens) if layer.has_cross_attention else None for layer in self.layers]

    def read(self, visual: list[Tensor | None], batch: int) -> tuple[Tensor, list[Tensor]]:
        """The queries' way through the layers.

        Args:
            visual: of `keys_values`.
            batch: B.

        Returns:
            [B, M, hidden]; each layer's keys and values of the queries [B, M, 2 hidden], for text that stands
            behind them.
        """
        x = self.embed(self.query_tokens.expand(batch, -1, -1))
        past = []
        for layer, seen in zip(self.layers, visual, strict=True):
            x, kv = layer(x, seen)
            past.append(kv)
        return x, past

    def embed(self, x: Tensor) -> Tensor:
        """What every embedding, of queries and of text, goes through first: [B, N, hidden] -> the same."""
        return self.dropout(self.input_norm(x))

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M for N visual tokens: as many as there are queries."""
        return self.num_query_token

    def lr_scales(self) -> dict[str, float]:
        if self.init_lr_scale == 1.0:
            return {}
        parts = ("cross_query", "cross_key_value", "cross_out", "cross_norm")
        crossing = [i for i, layer in enumerate(self.layers) if layer.has_cross_attention]
        at_random = {f"layers.{i}.{part}": 1.0 for i in crossing for part in parts}
        return {"input_norm": self.init_lr_scale, "layers": self.init_lr_scale, **at_random}

    @torch.no_grad()
    def _initialise(self, init: str | None, embedding_rms: float | None) -> None:
        nn.init.normal_(self.query_tokens, std=INITIALISER_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIALISER_STD)
                nn.init.zeros_(module.bias)
        if init is not None:
            load_bert(self, init, "connector")
        if embedding_rms is not None and self.proj_out is not None:
            start_at_scale(self.proj_out, embedding_rms)  # what reaches it is layer-normalised

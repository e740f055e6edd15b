"""The perceiver resampler: learned latents that read the visual tokens by cross-attention.

Alayrac et al., *Flamingo: a Visual Language Model for Few-Shot Learning*, 2022 (arXiv 2204.14198), section
3.1 and appendix A.1.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evlgen.common.errors import ConfigError
from evlgen.common.memory import check_fits
from evlgen.common.registry import registry
from evlgen.config.schema import PositiveInt
from evlgen.models.connectors.base import Connector, ConnectorInputs
from evlgen.models.connectors.projection import count_frames, start_at_scale


class ResamplerLayer(nn.Module):
    """Cross-attention from the latents to tokens and latents, then a feed-forward block; both pre-norm.

    Linear layers have no bias, and visual tokens and latents each their own norm, as in Flamingo.
    """

    def __init__(self, width: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.tokens_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.ff_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """[B, M, C], [B, N, C] -> [B, M, C]."""
        normed = self.latents_norm(latents)
        read = torch.cat([self.tokens_norm(tokens), normed], dim=1)  # [B, N + M, C]
        q = self.query(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, M, d]
        k, v = self.key_value(read).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, M, C]
        latents = latents + self.attention_out(attended)
        return latents + self.down(F.gelu(self.up(self.ff_norm(latents))))


@registry.register_connector("resampler")
class Resampler(Connector):
    """A fixed number of learned latents read the visual tokens; what they hold in the end are the soft
    prompts.

    Tokens have no positions here: the vision encoder's are in them. Frames in a row (N a multiple of
    ``num_tokens``) get a learned embedding each where ``num_frames`` says so.

    Args:
        inputs: what it stands between, see `ConnectorInputs`.
        num_latents: soft prompts. Flamingo has 64, BLIP-2's Q-Former, which does the same work, 32.
        num_layers: layers.
        hidden_size: channels of latents and tokens inside; None: the visual tokens'.
        num_attention_heads: heads; they split the channels.
        intermediate_size: channels inside the feed-forward blocks; None: four times hidden_size.
        num_frames: frames that have an embedding of their own; more frames stretch them. 1: none has, and
            the order of frames is not seen.

    Raises:
        ConfigError: hidden_size is no multiple of num_attention_heads; more weights than this machine has
            memory for.
    """

    def __init__(
        self,
        inputs: ConnectorInputs,
        num_latents: PositiveInt = 32,
        num_layers: PositiveInt = 6,
        hidden_size: PositiveInt | None = None,
        num_attention_heads: PositiveInt = 8,
        intermediate_size: PositiveInt | None = None,
        num_frames: PositiveInt = 1,
    ) -> None:
        super().__init__()
        width = hidden_size or inputs.vision_dim
        intermediate_size = intermediate_size or 4 * width
        if width % num_attention_heads:
            raise ConfigError(
                f"model.connector.hidden_size {width} is no multiple of num_attention_heads "
                f"{num_attention_heads}."
            )
        layer_weights = 4 * width**2 + 2 * width * intermediate_size
        other_weights = (num_latents + num_frames + inputs.vision_dim + inputs.language_dim) * width
        check_fits(num_layers * layer_weights + other_weights, "model.connector")
        self.num_tokens = inputs.num_tokens
        self.proj_in = nn.Linear(inputs.vision_dim, width)
        self.latents = nn.Parameter(torch.randn(num_latents, width))
        self.frame_embeddings = (
            nn.Parameter(0.02 * torch.randn(num_frames, width)) if num_frames > 1 else None
        )
        self.layers = nn.ModuleList(
            ResamplerLayer(width, num_attention_heads, intermediate_size) for _ in range(num_layers)
        )
        self.out_norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, inputs.language_dim)
        if inputs.embedding_rms is not None:
            start_at_scale(self.proj_out, inputs.embedding_rms)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> soft prompts [B, num_latents, language_dim]."""
        x = self._with_frames(self.proj_in(tokens))
        latents = self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        return self.proj_out(self.out_norm(latents))

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M: the latents, for any N."""
        return len(self.latents)

    def _with_frames(self, x: Tensor) -> Tensor:
        """Adds each frame's embedding to its tokens."""
        if self.frame_embeddings is None:
            return x
        frames = count_frames(x.shape[1], self.num_tokens)
        table: Tensor = self.frame_embeddings
        if frames > len(table):
            line = table.T.unsqueeze(0)
            table = F.interpolate(line, size=frames, mode="linear", align_corners=True).squeeze(0).T
        return (x.unflatten(1, (frames, -1)) + table[:frames, None]).flatten(1, 2)

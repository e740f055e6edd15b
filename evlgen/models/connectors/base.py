"""The contract of connectors: visual tokens in, soft prompts out."""

from __future__ import annotations

from torch import Tensor, nn


class Connector(nn.Module):
    """Turns visual tokens [B, N, vision_dim] into soft prompts [B, M, language_dim].

    A subclass's constructor takes what `FROM_FRAMEWORK` lists from the framework (by keyword); its other
    parameters are the keys of ``model.connector`` in YAML.

    One that merges tokens also defines ``forward_details(tokens)``, a dict with ``merge_map`` [B, N] (int64),
    the soft prompt each visual token ended in, and, where it merges in several layers, ``layer_maps``, the
    same after each of them: `evlgen.visualization` draws these.
    """

    FROM_FRAMEWORK: tuple[str, ...] = (
        "vision_dim",  # channels of the visual tokens
        "language_dim",  # channels of the language model's word embeddings
        "num_tokens",  # visual tokens of one image, class token included
        "num_prefix_tokens",  # of these, how many stand before the patches (class token, registers)
        "embedding_rms",  # root mean square of the word embeddings: the scale soft prompts should start at
    )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> [B, M, language_dim]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens)")

    def lr_scales(self) -> dict[str, float]:
        """Factors on the learning rate by the start of weights' names, where some need another rate."""
        return {}

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M for N visual tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define num_soft_prompts(num_tokens)")

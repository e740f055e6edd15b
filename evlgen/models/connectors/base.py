"""The contract of connectors: visual tokens in, soft prompts out."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from evlgen.models.vision.base import VisionEncoder


@dataclass(frozen=True)
class ConnectorInputs:
    """What a connector stands between.

    Attributes:
        vision_dim: channels of the visual tokens.
        language_dim: channels of the language model's word embeddings; 0 without a language model (BLIP-2's
            first stage).
        num_tokens: visual tokens of one image, class token included; the concatenated frames of a video are a
            multiple. None: not known.
        num_prefix_tokens: of these, how many stand before the patches (class token, registers).
        embedding_rms: root mean square of the word embeddings, the scale soft prompts start at; None keeps
            the modules' own initialisation.
    """

    vision_dim: int
    language_dim: int
    num_tokens: int | None = None
    num_prefix_tokens: int = 1
    embedding_rms: float | None = None

    @classmethod
    def behind(
        cls, vision: VisionEncoder, language_dim: int = 0, embedding_rms: float | None = None
    ) -> ConnectorInputs:
        """Those behind this encoder."""
        return cls(vision.embed_dim, language_dim, vision.num_tokens, vision.num_prefix_tokens, embedding_rms)


class Connector(nn.Module):
    """Turns visual tokens [B, N, vision_dim] into soft prompts [B, M, language_dim].

    A subclass's constructor takes ``inputs`` (`ConnectorInputs`) first; its other parameters are the keys of
    ``model.connector`` in YAML.

    One that merges tokens also defines ``forward_details(tokens)``, a dict with ``merge_map`` [B, N] (int64),
    the soft prompt each visual token ended in, and, where it merges in several layers, ``layer_maps``, the
    same after each of them: `evlgen.visualization` draws these.
    """

    #: Constructor parameters that are no keys in YAML: ``inputs``, or its fields by name in an older plugin.
    FROM_FRAMEWORK: ClassVar[tuple[str, ...]] = ("inputs", *ConnectorInputs.__dataclass_fields__)

    #: Starts of the names of weights in a checkpoint of an earlier stage that have no place here, by intent;
    SPARE_WEIGHTS: ClassVar[tuple[str, ...]] = ()
    #: those of text, which are spare where the checkpoint has all of ``FIRST_STAGE`` too.
    SPARE_TEXT: ClassVar[tuple[str, ...]] = ()
    FIRST_STAGE: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, inputs: ConnectorInputs, **settings: Any) -> Connector:
        """A connector between these two models. A constructor without ``inputs`` gets its fields by name."""
        if "inputs" in inspect.signature(cls).parameters:
            return cls(inputs, **settings)
        return cls(**vars(inputs), **settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, vision_dim] -> [B, M, language_dim]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens)")

    def lr_scales(self) -> dict[str, float]:
        """Factors on the learning rate by the start of weights' names, where some need another rate."""
        return {}

    def num_soft_prompts(self, num_tokens: int) -> int:
        """M for N visual tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define num_soft_prompts(num_tokens)")

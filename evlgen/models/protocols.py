"""What some models offer and others do not. A task asks a model for what it needs with `offering`.

What every model offers is `evlgen.models.base_model.BaseModel`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeGuard, TypeVar, cast

from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError

if TYPE_CHECKING:
    from evlgen.models.connectors.base import Connector
    from evlgen.models.language.base import LanguageModel
    from evlgen.models.soft_prompts import SoftPromptHead
    from evlgen.models.tiles import Tiling
    from evlgen.models.vision.base import VisionEncoder

T = TypeVar("T")


class HasVision(Protocol):
    """Reads images through a vision encoder, whose image size and normalisation are those of its images."""

    vision: VisionEncoder


class EncodesImages(HasVision, Protocol):
    """Gives the encoder's tokens of images, which can be kept (`evlgen.vision_cache`)."""

    def encode(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, C_vision]."""


class ReadsVideo(Protocol):
    """May read videos: see `reads_videos`."""

    #: How the frames of a video become one set of visual tokens (`TemporalConfig`); None: it reads images.
    temporal: str | None


class CutsTiles(Protocol):
    """May cut images into tiles: see `tiling_of`."""

    tiling: Tiling | None  # None: it reads an image as a whole


class HasConnector(Protocol):
    """Has a connector between its vision encoder and its language model."""

    connector: Connector


class HasLanguageModel(Protocol):
    """Writes with a language model."""

    language: LanguageModel


class HasSoftPrompts(Protocol):
    """Gives what its language model reads of images, and the loss of texts behind it."""

    def soft_prompts(self, samples: Batch) -> Tensor:
        """[B, M, C_language]."""

    def sample_losses(self, samples: Batch, soft_prompts: Tensor | None = None) -> dict[str, Tensor]:
        """``losses`` and ``num_tokens``, [N] each; see `VLM.sample_losses`."""


class HasPromptHead(Protocol):
    """May add learned places to its soft prompts."""

    prompt_head: SoftPromptHead | None  # None: it adds nothing


class WritesTokens(Protocol):
    """Gives the tokens that it writes, so that it can learn from its own texts."""

    def generate_tokens(self, samples: Batch, *args: Any, **options: Any) -> list[list[int]]:
        """As `BaseModel.generate`, the tokens of each text; see `VLM.generate_tokens`."""

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `generate_tokens`."""


class AnswersQuestions(Protocol):
    """Writes short answers to questions."""

    def predict_answers(self, samples: Batch, *args: Any, **options: Any) -> list[str]:
        """One short answer for each sample's question; see `VLM.predict_answers`."""


class RanksAnswers(Protocol):
    """Chooses between given answers to questions."""

    def rank_answers(
        self, samples: Batch, candidates: Sequence[str] | Sequence[Sequence[str]], *args: Any, **options: Any
    ) -> list[str]:
        """The best of several given answers to each sample's question; see `VLM.rank_answers`."""


class HoldsConversations(Protocol):
    """Continues conversations."""

    def answer_turns(self, samples: Batch, *args: Any, **options: Any) -> list[str]:
        """The assistant's next turn of each sample's conversation; see `VLM.answer_turns`."""


class Chats(Protocol):
    """Answers in a conversation with somebody."""

    def chat(self, messages: Sequence[Any], *args: Any, **options: Any) -> Any:
        """What the assistant says next, whole or in pieces; see `VLM.chat`."""


class MergesTokens(Protocol):
    """A connector that merges tokens, and shows which: see `Connector`."""

    def forward_details(self, tokens: Tensor) -> dict[str, Any]:
        """``merge_map`` [B, N] and maybe ``layer_maps``."""


class NotOffered(ConfigError, AttributeError):
    """A model was asked for what it does not offer."""


def offers(model: object, protocol: type[T]) -> TypeGuard[T]:
    """Whether a model has all that a protocol names. (`isinstance` of Python 3.12 and later does not see the
    parts of a torch module.)"""
    return all(hasattr(model, name) for name in _members(protocol))


def offering(model: object, protocol: type[T]) -> T:
    """A model, as one that offers this.

    Raises:
        ConfigError: it does not, in the words of its `BaseModel.LACKS` where these say more.
    """
    for name in _members(protocol):
        try:
            getattr(model, name)
        except NotOffered:
            raise
        except AttributeError as error:
            needed = f"see {protocol.__name__} in {__name__}"
            raise NotOffered(f"{type(model).__name__} must define {name}: {needed}.") from error
    return cast(T, model)


def reads_videos(model: object) -> bool:
    """Whether a model is one of videos."""
    return offers(model, ReadsVideo) and model.temporal is not None


def tiling_of(model: object) -> Tiling | None:
    """How a model cuts images into tiles; None where it reads them as a whole."""
    return model.tiling if offers(model, CutsTiles) else None


def _members(protocol: type) -> list[str]:
    owners = [cls for cls in protocol.__mro__ if cls not in (Protocol, Generic, object)]
    names = {name for cls in owners for name in (*vars(cls), *inspect.get_annotations(cls))}
    return sorted(name for name in names if not name.startswith("_"))

"""What a caption metric offers, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from evlgen.common.errors import EVLGenError
from evlgen.tasks.metrics.java import find_java

ImageId = int | str
# Tokens joined by blanks, as pycocoevalcap's scorers read them: several references per image, one candidate
# in a list.
Tokenised = Mapping[ImageId, list[str]]


class MetricUnavailable(EVLGenError):
    """A metric cannot be computed on this machine. The message says why and what would help."""


@dataclass(frozen=True)
class MetricResult:
    """Values of one metric, by the names it has in the results.

    Attributes:
        values: over all images.
        per_image: name -> image id -> value, for the names that have values per image.
    """

    values: dict[str, float]
    per_image: dict[str, dict[ImageId, float]] = field(default_factory=dict)


class CaptionMetric(ABC):
    """Base of the metrics registered with ``@registry.register_metric(name)``.

    A metric of your own needs no more than ``names`` and ``compute``. It is constructed without arguments.

    Attributes:
        names: the names of its values in the results, such as ``("Bleu_1", "Bleu_2")``.
        needs_java: leave it out where Java 8 or newer is missing.
    """

    names: tuple[str, ...]
    needs_java: bool = False

    def unavailable(self) -> str | None:
        """Why the metric cannot run here, or None. Asked before `compute`."""
        java = find_java() if self.needs_java else None
        return java if isinstance(java, str) else None

    def begin(self) -> None:  # noqa: B027  (nothing to begin is the usual case)
        """Starts what takes long to start, before the captions are written that `compute` will be given. It
        may not be called, and `compute` may not follow."""

    def takes(self) -> bool:
        """Whether `take` is of use."""
        return False

    def take(self, references: Tokenised, candidates: Tokenised) -> None:
        """Takes captions that are written already, to score what takes long before `compute` asks for it;
        from another thread, which `compute` waits for. `compute` may be given other captions, or the same in
        other tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define take(references, candidates)")

    @abstractmethod
    def compute(self, references: Tokenised, candidates: Tokenised) -> MetricResult | dict[str, float]:
        """Scores candidates against references; both have the same ids in the same order.

        Raises:
            MetricUnavailable: it turned out that the metric cannot run here.
        """

"""The contract of language models: readers of soft prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from evlgen.models.language.consensus import SAMPLING, most_alike
from evlgen.models.language.segments import Part, Row, SoftPrompts
from evlgen.processors.turns import Turn


class LanguageModel(nn.Module):
    """Reads soft prompts [B, M, C] and then text.

    The constructor takes, by keyword, what `evlgen.models.language.build_language_model` hands it.

    Attributes:
        embed_dim: C, the channels of its word embeddings.
        end_token_ids: the tokens that end a text; empty where they are not known.
        positions_at_once: about how many positions of a batch go forward and backward before the others,
            where `goes_in_parts`.
    """

    embed_dim: int
    positions_at_once: int
    end_token_ids: Sequence[int] = ()

    @property
    def turn_end_token_ids(self) -> Sequence[int]:
        """The tokens that end the assistant's turn of a conversation."""
        return self.end_token_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are put into a chat template."""
        return False

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether a Hugging Face model with this ``config.json`` can be read by this class."""
        raise NotImplementedError

    @property
    def max_positions(self) -> int | None:
        """How many positions it can read; None where it has no limit."""
        return None

    def trained_modules(self) -> list[nn.Module]:
        """Modules inside a frozen language model that are trained nonetheless (adapters)."""
        return []

    def goes_in_parts(self) -> bool:
        """Whether `loss` and `weighted_loss` compute gradients with the losses, a part of the batch at a
        time."""
        return False

    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings' entries."""
        raise NotImplementedError

    def loss(
        self,
        soft_prompts: Tensor,
        text_in: list[str],
        text_out: list[str] | None = None,
        num_texts: list[int] | None = None,
    ) -> tuple[Tensor, int]:
        """The mean next-token loss of the text after the soft prompts.

        Args:
            soft_prompts: [B, M, C].
            text_in: the N texts to learn; or, where ``text_out`` is given, what is read but not learned.
            text_out: the texts to learn after ``text_in``.
            num_texts: how many of the N texts follow each image's soft prompts, each as if it was alone
                there; None: one. Passed only where an image has several.

        Returns:
            The loss (scalar, float32) and the number of tokens it is the mean of.
        """
        raise NotImplementedError

    def sample_losses(
        self,
        soft_prompts: Tensor,
        text_in: list[str],
        text_out: list[str] | None = None,
        num_texts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `loss`, of each text by itself: for ranking texts, weighing them, and rewarding them.

        Returns:
            The *sum* of the losses of each text's tokens ([N], float32: the negated log-likelihood of the
            text), and how many tokens that are ([N]).
        """
        raise NotImplementedError

    def token_losses(
        self,
        soft_prompts: Tensor,
        prompts: list[str],
        texts: list[list[int]],
        num_texts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `sample_losses`, of texts that are tokens already, each after its prompt just as
        `generate_tokens` writes it: the losses are of the very choices that were made there. A text without
        an end token is one that was cut, and its end is not learned."""
        raise NotImplementedError

    def check_room(self, num_soft_prompts: int, prompt: str | None, num_new: int, learns: bool) -> None:
        """Raises `ConfigError` where the longest texts that the settings allow have no room behind the soft
        prompts.

        Args:
            prompt: what is read before every text; None: questions.
            num_new: tokens generated at most; 0: none are.
            learns: whether texts are learned.
        """

    def check_whole(self, text: str) -> None:
        """Raises `DataError` for a text to read that would be cut."""

    def num_read(self, prompt: str) -> int:
        """How many tokens are read for a prompt, those around it included; 0 where that is not known."""
        return 0

    def without_answer(self, text_in: list[str], text_out: list[str]) -> list[int]:
        """The places of texts that are so long that nothing of their ``text_out`` is left to learn."""
        return []

    def log_likelihoods(
        self,
        soft_prompts: Tensor,
        prompts: list[str],
        texts: Sequence[Sequence[str]],
        num_candidates: int | None = None,
    ) -> list[Tensor]:
        """How likely each of several texts is after each prompt.

        Args:
            soft_prompts: [B, M, C].
            prompts: B texts that are read, as in `generate`.
            texts: for each prompt its own, or the same list for all; at least one.
            num_candidates: of how many texts of a prompt all is read, those with the likeliest first tokens;
                None: of all.

        Returns:
            B tensors, on the CPU, with as many values as the prompt has texts: the sum of the log-likelihoods
            of a text's tokens and of its end; -inf where only the first token was read.
        """
        raise NotImplementedError

    def row_of_parts(self, parts: Sequence[Part]) -> Row:
        """The tokens of a sample that is a sequence of texts and images (`segments`)."""
        raise NotImplementedError

    def row_of_turns(self, turns: Sequence[Turn], answers_next: bool = False) -> Row:
        """The tokens of a conversation, of which what the assistant says is learned.

        Args:
            answers_next: whether the assistant's next turn begins there, to be generated.

        Raises:
            DataError: the chat template does not take such turns.
        """
        raise NotImplementedError

    def rows_loss(self, soft_prompts: SoftPrompts, rows: Sequence[Row]) -> tuple[Tensor, int]:
        """As `loss`, of samples of any segments.

        Args:
            soft_prompts: of the images and videos of all rows, in the order in which they stand there:
                [K, M, C], or K tensors [M, C].
            rows: as `row_of_parts` and `row_of_turns` give them.
        """
        raise NotImplementedError

    def rows_losses(self, soft_prompts: SoftPrompts, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """As `sample_losses`, of samples of any segments; see `rows_loss`."""
        raise NotImplementedError

    def to_learn(self, text_in: list[str], text_out: list[str] | None = None) -> Sequence[Row]:
        """Texts as `loss` reads them, as rows. Asked for where `goes_in_parts`."""
        raise NotImplementedError

    def tokens_to_learn(self, prompts: list[str], texts: list[list[int]]) -> Sequence[Row]:
        """Texts as `token_losses` reads them, as rows. Asked for where `goes_in_parts`."""
        raise NotImplementedError

    def weighted_loss(
        self,
        soft_prompts: SoftPrompts,
        rows: Sequence[Row],
        weights: Tensor,
        num_texts: list[int] | None = None,
    ) -> Tensor:
        """The sum of the negated log-likelihoods of rows, each times its weight ([N]): a scalar. Asked for
        where `goes_in_parts`.

        Args:
            soft_prompts, rows: as in `rows_loss`; with ``num_texts`` as in `loss`.
        """
        raise NotImplementedError

    def continue_rows(self, soft_prompts: SoftPrompts, rows: Sequence[Row], **options) -> list[list[int]]:
        """As `generate_tokens`, after samples of any segments; see `rows_loss`."""
        raise NotImplementedError

    def stream_row(self, soft_prompts: SoftPrompts, row: Row, **options) -> Iterator[list[int]]:
        """As `continue_rows`, of one row and without beams: all tokens so far, each time there are more."""
        raise NotImplementedError

    def generate(
        self, soft_prompts: Tensor, prompts: list[str], consensus: int = 0, **options: Any
    ) -> list[str]:
        """Continues each prompt after its soft prompts; the new text only, ``num_captions`` texts for each
        prompt.

        Args:
            consensus: how many texts are sampled for each prompt besides; of these and what ``options`` find,
                those that are most like the others are given (`consensus`).
            options: as of `generate_tokens`.
        """
        return self.texts(self.agreed_tokens(soft_prompts, prompts, consensus, **options))

    def agreed_tokens(
        self, soft_prompts: Tensor, prompts: list[str], consensus: int = 0, **options: Any
    ) -> list[list[int]]:
        """As `generate`, the tokens."""
        found = self.generate_tokens(soft_prompts, prompts, **options)
        if not consensus:
            return found
        sampling = {**options, **SAMPLING, "num_captions": consensus}
        sampled = self.generate_tokens(soft_prompts, prompts, **sampling)
        wanted = len(found) // len(prompts)
        chosen: list[list[int]] = []
        for number in range(len(prompts)):
            own = found[number * wanted : (number + 1) * wanted]
            own = own + sampled[number * consensus : (number + 1) * consensus]
            chosen += [own[place] for place in most_alike(own)[:wanted]]
        return chosen

    def generate_tokens(self, soft_prompts: Tensor, prompts: list[str], **options) -> list[list[int]]:
        """As `generate`, the tokens: the last one is an end token unless ``max_length`` cut the text."""
        raise NotImplementedError

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `generate_tokens`."""
        raise NotImplementedError

"""What the page shows of one model: captions with the probabilities of their words, merging, answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from evlgen.models.base_model import BaseModel
from evlgen.models.pixels import pixels_of
from evlgen.models.protocols import HasLanguageModel, offering, reads_videos
from evlgen.processors.turns import read_turns
from evlgen.serving.answering import Answerer, Ask
from evlgen.visualization.figure import merge_videos
from evlgen.visualization.merging import Merging

#: What stands for the end of a text among its words.
END = "(end)"


@dataclass(frozen=True)
class Caption:
    """A text, and how likely the model held each of its words after those before it."""

    text: str
    words: list[tuple[str, float]]


class Exhibit:
    """One model of the page.

    Args:
        title: what the page calls it.
        model: in eval mode, on its device; one that writes texts.
        question: see `Answerer`.

    Attributes:
        chats: whether a question is read together with those before it; otherwise each is asked alone.
    """

    def __init__(self, title: str, model: BaseModel, question: str | None = None) -> None:
        self.title, self.model = title, model
        self.answerer = Answerer(model, question)
        self.chats = offering(model, HasLanguageModel).language.has_chat_template

    def pixels(self, frames: Sequence[Image.Image]) -> Tensor:
        """An image or the frames of a video as the model reads them: [1, 3, T, H, W] by a model of videos;
        else [T, 3, H, W], as every frame is an image to it."""
        of_videos = reads_videos(self.model)
        pixels = pixels_of(self.model, [list(frames)] if of_videos else list(frames))
        return torch.stack([*pixels]).to(self.model.device)

    @torch.no_grad()
    def captions(self, frames: Sequence[Image.Image], num_beams: int, max_length: int) -> list[Caption]:
        """One caption, or to a model of images one of each frame.

        Args:
            num_beams: of the search.
            max_length: new tokens at most.
        """
        decoding = self.answerer.decoding(False, num_beams=num_beams, max_length=max_length)
        samples = self.model.encoded({"image": self.pixels(frames)})
        options = dataclasses.asdict(decoding)
        if consensus := self.answerer.consensus(decoding):
            options["consensus"] = consensus
        texts = self.model.generate_tokens(samples, **options)
        soft_prompts = self.model.soft_prompts(samples)
        return [
            Caption(self.model.texts([tokens])[0], self._words(soft_prompts[i : i + 1], tokens))
            for i, tokens in enumerate(texts)
        ]

    def merging(self, frames: Sequence[Image.Image]) -> list[Merging]:
        """How the visual tokens become soft prompts. Raises `ConfigError` for a connector that does not
        merge."""
        (found,) = merge_videos(self.model, [frames])
        return found

    def answer(self, frames: Sequence[Image.Image], history: Sequence[dict[str, Any]], question: str) -> str:
        """The answer to a question.

        Args:
            history: the turns before it, ``{"role": .., "content": text}``, for a model that `chats`.

        Raises:
            DataError: a question that is too long.
        """
        images = list(self.pixels(frames))
        if not self.chats:
            decoding = self.answerer.decoding(True)
            asks = [Ask([image], question, decoding) for image in images]
        else:
            first, *later = [*history, {"role": "user", "content": question}]
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": first["content"]}]
            turns = read_turns([{"role": "user", "content": content}, *later])
            decoding = self.answerer.decoding(False, num_beams=1, max_length=self.answerer.most_tokens)
            asks = [Ask(images, None, decoding, turns=turns)]
        texts = [answer.texts[0].text for answer in self.answerer.answer(asks)]
        return "\n\n".join(texts)

    def _words(self, soft_prompts: Tensor, tokens: list[int]) -> list[tuple[str, float]]:
        """The words of a text with their probabilities: the products of those of a word's tokens.

        The log-likelihood of a token is that of the text up to it without that of the text before it.
        """
        starts = [tokens[:length] for length in range(1, len(tokens) + 1)]
        samples = {"text_tokens": starts, "num_texts": [len(starts)]}
        sums = [0.0, *(-self.model.sample_losses(samples, soft_prompts)["losses"]).tolist()]
        texts = ["", *self.model.texts(starts)]
        words: list[tuple[str, float]] = []
        begun = 0  # of the tokens, the first one of the word that is being read
        for i in range(1, len(texts)):
            is_last = i == len(texts) - 1
            if is_last or texts[i + 1][len(texts[i]) :][:1].isspace() or texts[-1] == texts[i]:
                word = texts[i][len(texts[begun]) :].strip()
                if word or is_last:
                    words.append((word or END, float(torch.tensor(sums[i] - sums[begun]).exp())))
                    begun = i
        return words

"""From requests to texts: the one place of the server that knows the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError
from evlgen.media.video import FrameList
from evlgen.models.base_model import BaseModel
from evlgen.models.language.generation import Decoding, watched
from evlgen.models.language.hugging_face import truncate_at_eos
from evlgen.models.prompts import SLOT, ask, check_slots
from evlgen.models.protocols import reads_videos
from evlgen.models.vlm import VLM
from evlgen.models.zoo import load_preprocess
from evlgen.processors.turns import Turn

#: What the text of a request is put into, unless the model has a chat template of its own.
QUESTION = "Question: {} Short answer:"
_ANSWER_TOKENS = 256  # as `VLM.chat` has them


@dataclass(frozen=True)
class Ask:
    """One request, ready for the model.

    Attributes:
        images: each [3, H, W], or [3, T, H, W] where the model reads videos; one, unless there are turns.
        text: of the user; None: a caption is wanted.
        decoding: how its texts are chosen.
        seed: of sampling; None: as it comes.
        turns: of a conversation, which is answered in place of a text.
        on_texts: called with its texts so far after each token, from the thread that generates them; not
            where ``consensus`` chooses among whole ones.
        consensus: texts sampled besides; see `Writing.generate`.
    """

    images: Sequence[Tensor]
    text: str | None
    decoding: Decoding
    seed: int | None = None
    turns: Sequence[Turn] | None = None
    on_texts: Callable[[list[str]], None] | None = None
    consensus: int = 0

    @property
    def kind(self) -> tuple:
        """Requests of one kind may be answered in one batch; one with a seed is answered alone, as its
        texts must not depend on others."""
        what = tuple(self.images[0].shape) if self.turns is None else "turns"
        return (what, self.decoding, self.consensus, None if self.seed is None else id(self))


@dataclass(frozen=True)
class Text:
    """One text of an answer; ``is_cut`` where it has reached the number of tokens asked for."""

    text: str
    num_tokens: int
    is_cut: bool


@dataclass(frozen=True)
class Answer:
    """The texts of a request, and how many tokens were read for each."""

    texts: list[Text]
    prompt_tokens: int


class Stopped(Exception):
    """Nobody waits for the texts any more."""


class Answerer:
    """Answers requests by a model.

    Args:
        model: in eval mode, on its device.
        question: a format with one slot for the text of a request; ``{}``: the text is continued as it is.
            None: `QUESTION`, or ``{}`` where the model has a chat template.
        only_turns: every request is a conversation, as the model has learned them; otherwise a single message
            with one image is a question or asks for a caption.

    Raises:
        ConfigError: a model that writes no texts, or a format without a slot.
    """

    def __init__(self, model: BaseModel, question: str | None = None, only_turns: bool = False) -> None:
        if not isinstance(model, VLM):
            raise ConfigError(f"{type(model).__name__} writes no texts, so it cannot be served.")
        if question is None:
            question = SLOT if model.language.has_chat_template else QUESTION
        if question.count(SLOT) != 1:
            raise ConfigError(
                f"the prompt {question!r} must have one slot {SLOT}, for the text of a request."
            )
        check_slots(question)
        self.model = model
        self.question = question
        self.only_turns = only_turns
        self._reads_videos = reads_videos(model)
        self._process = load_preprocess(model, num_frames=None)[0]["eval"]

    def pixels(self, image: Image.Image) -> Tensor:
        """An image as the model reads it; see `Ask`."""
        return self._process(FrameList([image]) if self._reads_videos else image)

    @property
    def most_tokens(self) -> int:
        """New tokens of the answer to a conversation where a request does not say."""
        positions = self.model.language.max_positions
        return _ANSWER_TOKENS if positions is None else max(1, min(_ANSWER_TOKENS, positions // 4))

    def decoding(self, has_text: bool, **options) -> Decoding:
        """How texts are chosen: ``options``, without those that are None, over what the model's own
        configuration says."""
        given = {key: value for key, value in options.items() if value is not None}
        default = self.model.generation_default
        length = "answer_length_penalty" if has_text else "length_penalty"
        own = {"length_penalty": default(length), "repetition_penalty": default("repetition_penalty")}
        return Decoding(**{**own, **given})

    def consensus(self, decoding: Decoding) -> int:
        """`Ask.consensus` of a caption."""
        return 0 if decoding.use_nucleus_sampling else (self.model.generation.consensus or 0)

    def answer(self, requests: Sequence[Ask], is_wanted: Callable[[], bool] = lambda: True) -> list[Answer]:
        """The answers to requests of one `Ask.kind`.

        Args:
            is_wanted: called before every token; false ends the work.

        Raises:
            Stopped: ``is_wanted`` said no.
            EVLGenError: one of them cannot be answered, such as one with too long a text.
        """
        model, first = self.model, requests[0]
        options = dataclasses.asdict(first.decoding)
        with (
            self._as_long_as(is_wanted),
            self._seeded(first.seed),
            self._reporting(requests),
            torch.no_grad(),
        ):
            if first.turns is None:
                prompts = [self._prompt(request.text) for request in requests]
                images = torch.stack([request.images[0] for request in requests]).to(model.device)
                samples: Batch = {"image": images, "prompt": prompts}
                agreed = {"consensus": first.consensus} if first.consensus else {}
                tokens = model.generate_tokens(samples, **agreed, **options)
            else:
                prompts = ["".join(turn.text for turn in request.turns or ()) for request in requests]
                samples = {
                    "messages": [request.turns or () for request in requests],
                    "images": [list(request.images) for request in requests],
                }
                tokens = model.answer_turns_tokens(samples, **options)
        ends = self._ends(first)
        texts = [
            Text(text, len(ids), len(ids) >= first.decoding.max_length and ids[-1] not in ends)
            for text, ids in zip(self._texts(first, tokens), tokens, strict=True)
        ]
        each = first.decoding.num_captions
        return [
            Answer(texts[place * each : (place + 1) * each], self._num_read(prompt, request.images))
            for place, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        ]

    def _ends(self, request: Ask) -> Sequence[int]:
        """The tokens that end the texts of a request."""
        language = self.model.language
        return language.end_token_ids if request.turns is None else language.turn_end_token_ids

    def _texts(self, request: Ask, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens that answer a request."""
        return self.model.texts(tokens) if request.turns is None else self.model.texts_of_turns(tokens)

    def _prompt(self, text: str | None) -> str:
        """What is read before the answer. Raises `DataError` for a text that would be cut."""
        if text is None:
            return self.model.prompt
        (prompt,) = ask(self.question, {"text_input": [text]}, 1)
        self.model.language.check_whole(prompt)
        return prompt

    def _num_read(self, prompt: str, images: Sequence[Tensor]) -> int:
        """Soft prompts and text tokens read before an answer; without those of a conversation's template."""
        soft = sum(map(self.model.num_soft_prompts, images))
        return soft + self.model.language.num_read(prompt)

    @contextlib.contextmanager
    def _as_long_as(self, is_wanted: Callable[[], bool]) -> Iterator[None]:
        def check(*_) -> None:
            if not is_wanted():
                raise Stopped

        inner = next((m for m in self.model.language.modules() if isinstance(m, PreTrainedModel)), None)
        handle = None if inner is None else inner.register_forward_pre_hook(check)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def _reporting(self, requests: Sequence[Ask]) -> contextlib.AbstractContextManager[None]:
        """Within it, `Ask.on_texts` of the requests is called after each token."""
        if requests[0].consensus or all(request.on_texts is None for request in requests):
            return contextlib.nullcontext()
        first = requests[0]
        each, ends = first.decoding.num_captions, list(self._ends(first))

        def report(tokens: list[list[int]]) -> None:
            for place, request in enumerate(requests):
                if request.on_texts is not None:
                    own = tokens[place * each : (place + 1) * each]
                    request.on_texts(self._texts(first, [truncate_at_eos(row, ends) for row in own]))

        return watched(report)

    @contextlib.contextmanager
    def _seeded(self, seed: int | None) -> Iterator[None]:
        """The same numbers for the same seed, and those of before afterwards."""
        if seed is None:
            yield
            return
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

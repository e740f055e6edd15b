"""The model ``evlgen`` of lmms-eval, so that its tasks score any checkpoint.

``python -m lmms_eval --model evlgen --model_args checkpoint=FOLDER --tasks ...``. lmms-eval finds it by this
package's entry point ``lmms_eval.models``, which is `manifest`; the class it loads is `EVLGen`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from evlgen.batch import Batch
from evlgen.captioning import default_device
from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.common.plugins import load_plugins
from evlgen.media.video import VIDEO_SUFFIXES
from evlgen.models.chatting import pixels_of_visual
from evlgen.models.language.segments import Learn, Part, Read, Visual, num_positions
from evlgen.models.vlm import VLM
from evlgen.models.zoo import load_model_of
from evlgen.processors.turns import Turn, VisualPart

_NEW_TOKENS = 256  # of an answer at most, where a task does not say
MARKER = "<image>"  # what tasks write into a text where an image stands
_ARGUMENTS = (
    "checkpoint",
    "cfg_path",
    "plugins",
    "chat",
    "num_frames",
    "allow_downloads",
    "batch_size",
    "device",
)


def manifest() -> Any:
    """The entry point: a ``ModelManifest`` that names `EVLGen`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("evlgen", simple_class_path=f"{__name__}.EVLGen")


def __getattr__(name: str) -> Any:
    if name == "EVLGen":
        return _model_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@functools.cache
def _model_class() -> type:
    """`Harnessed` as a subclass of lmms-eval's own class, which only the extra installs."""
    try:
        from lmms_eval.api.instance import GenerationResult
        from lmms_eval.api.model import lmms
    except ModuleNotFoundError as error:
        raise ConfigError("lmms-eval is not installed: pip install 'evlgen[lmms]'.") from error

    class EVLGen(Harnessed, lmms):
        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            # lmms-eval 0.7.3 makes a text of every other tuple, and its multiple choice fails
            return [GenerationResult(scores) for scores in super().loglikelihood(requests)]

    return EVLGen


class Question(NamedTuple):
    """What stands before an answer.

    Attributes:
        text: may be empty, where a task wants a caption.
        visuals: images and videos, in their order.
        images: their pixels.
        key: the same of the same text about the same sample.
    """

    text: str
    visuals: Sequence[VisualPart]
    images: Sequence[Tensor]
    key: Any


class Harnessed:
    """A checkpoint as lmms-eval drives it.

    A request's text is the prompt; where it is empty the model's own. A sample of one image (or video) is a
    caption or question, one of several or none a sequence of segments; with ``chat`` every sample is a
    conversation. Images stand where the text has ``<image>``, if it has as many, else before it.

    Args:
        checkpoint: folder of a run, of a checkpoint or of `save_pretrained`, or ``user/name`` on the hub.
        cfg_path: project or model file, as of ``evlgen caption``. With neither, the bundled model.
        plugins: modules or files to load first, with ``;`` between them.
        chat: whether requests are users' turns of a conversation; None: where the model has a
            ``chat_template``.
        num_frames: of a video file at most, evenly spaced.
        allow_downloads: see `BaseModel.from_pretrained`.
        batch_size: requests at once.
        device: None: the GPU of this process, or the CPU.

    Raises:
        ConfigError: an unknown argument; a model that writes no texts.
    """

    task_dict: dict[str, Any]

    def __init__(
        self,
        checkpoint: str | None = None,
        cfg_path: str | None = None,
        plugins: str = "",
        chat: bool | None = None,
        num_frames: int | str = 8,
        allow_downloads: bool = False,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            hint = did_you_mean(name, _ARGUMENTS)
            raise ConfigError(
                f"--model_args: evlgen has no argument '{name}'.{hint} Arguments: {', '.join(_ARGUMENTS)}."
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size {batch_size}: evlgen takes a number, at least 1.")
        self.batch_size, self.num_frames = int(batch_size), int(num_frames)
        self._use_processes()
        load_plugins([name for name in plugins.split(";") if name], None)
        self.device = torch.device(device or default_device())
        model = load_model_of(cfg_path, checkpoint, (), str(self.device), allow_downloads)
        if not isinstance(model, VLM):
            raise ConfigError(f"{type(model).__name__} writes no texts, so lmms-eval cannot score it.")
        self.model: VLM = model.eval()
        self.chat = self.model.language.has_chat_template if chat is None else bool(chat)

    def _use_processes(self) -> None:
        """lmms-eval gives each process of ``accelerate launch`` a part of the samples."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A text for each request, in their order.

        Of a request's settings ``max_new_tokens``, ``num_beams`` (1 unless given), ``do_sample``,
        ``temperature``, ``top_p``, ``repetition_penalty``, ``length_penalty`` and ``until`` are read. A text
        has no more tokens than the language model has room for.
        """
        texts: list[str] = []
        for chunk in self._chunks(requests):
            questions = self._questions(chunk)
            options = [self._options(r.args[1], q) for r, q in zip(chunk, questions, strict=True)]
            found: dict[int, str] = {}
            for places in _alike([(self._form(q), o) for q, o in zip(questions, options, strict=True)]):
                answers = self._write([questions[place] for place in places], options[places[0]])
                found.update(zip(places, answers, strict=True))
            texts += [_until(found[place], r.args[1].get("until")) for place, r in enumerate(chunk)]
        return texts

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request how unlikely its continuation is, and whether greedy search writes it.

        The first is the *negated* log-likelihood of the continuation's tokens and of its end: lmms-eval's
        multiple choice takes the smallest value, as its own models return losses. Unlike theirs it is the sum
        over the tokens, not the mean.
        """
        scores: list[tuple[float, bool]] = []
        for chunk in self._chunks(requests):
            questions = self._questions(chunk)
            answers = [self._continuation(request).strip() for request in chunk]
            found: dict[int, tuple[float, bool]] = {}
            for places in _alike([self._form(question) for question in questions]):
                scored = self._score([questions[p] for p in places], [answers[p] for p in places])
                found.update(zip(places, scored, strict=True))
            scores += [found[place] for place in range(len(chunk))]
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises `ConfigError`."""
        raise ConfigError("evlgen answers tasks of one round (output_type: generate_until).")

    # ---- from requests to questions

    def _chunks(self, requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
        starts = range(0, len(requests), self.batch_size)
        for start in tqdm(starts, "evlgen", disable=getattr(self, "_rank", 0) != 0):
            yield requests[start : start + self.batch_size]

    def _questions(self, requests: Sequence[Any]) -> list[Question]:
        """Requests of one sample share its pixels."""
        known: dict[Any, tuple[list[VisualPart], list[Tensor]]] = {}
        questions = []
        for request in requests:
            text, sample = request.args[0], tuple(request.args[3:6])
            if sample not in known:
                visuals = [_visual(source) for source in self._sources(request)]
                known[sample] = visuals, [pixels_of_visual(self.model, v, self.num_frames) for v in visuals]
            questions.append(Question(text, *known[sample], (sample, text)))
        return questions

    def _sources(self, request: Any) -> Sequence[Any]:
        """A request's images and videos. (Those of a choice by itself, for mutual information, have none.)"""
        return (request.args[2](self._document(request)) or []) if len(request.args) > 2 else []

    def _document(self, request: Any) -> Any:
        number, task, split = request.args[3:6]
        return self.task_dict[task][split][number]

    def _continuation(self, request: Any) -> str:
        target = request.args[1]
        return target if isinstance(target, str) else str(target(self._document(request)))

    def _form(self, question: Question) -> tuple:
        """Questions of the same form may stand in one batch."""
        if self._is_single(question):
            return ("image", *question.images[0].shape)
        return ("sequence",)

    def _is_single(self, question: Question) -> bool:
        return not self.chat and len(question.images) == 1

    # ---- from questions to samples

    def _prompt(self, question: Question) -> str:
        text = question.text
        return (text.replace(MARKER, "").strip() if text.count(MARKER) == 1 else text) or self.model.prompt

    def _parts(self, question: Question) -> list[str | VisualPart]:
        """The texts and images of a sequence."""
        visuals, texts = list(question.visuals), question.text.split(MARKER)
        parts: list[str | VisualPart] = [*visuals, question.text or self.model.prompt]
        if len(texts) - 1 == len(visuals):
            parts = [texts[0]]
            for visual, text in zip(visuals, texts[1:], strict=True):
                parts += [visual, text]
        return [part for part in parts if part]

    def _samples(self, questions: Sequence[Question], answers: Sequence[str] | None = None) -> Batch:
        """A batch of questions of one form; with ``answers`` to be scored."""
        if self._is_single(questions[0]):
            samples: Batch = {"image": torch.stack([q.images[0] for q in questions]).to(self.model.device)}
            prompts = [self._prompt(question) for question in questions]
            if answers is None:
                samples["prompt"] = prompts
            else:
                samples["text_input"], samples["text_output"] = prompts, list(answers)
            return samples
        samples = {"images": [list(question.images) for question in questions]}
        rows = [self._parts(question) for question in questions]
        if self.chat:
            turns = [[Turn("user", tuple(parts))] for parts in rows]
            if answers is not None:
                turns = [[*of_one, Turn("assistant", (a,))] for of_one, a in zip(turns, answers, strict=True)]
            samples["messages"] = turns
        else:
            samples["segments"] = [_segments(parts) for parts in rows]
            if answers is not None:
                pairs = zip(samples["segments"], answers, strict=True)
                samples["segments"] = [[*parts, Learn(answer)] for parts, answer in pairs]
        return samples

    # ---- the model

    def _options(self, how: dict[str, Any], question: Question) -> dict[str, Any]:
        temperature = float(how.get("temperature") or 0)
        samples = bool(how.get("do_sample", temperature > 0)) and temperature > 0
        options: dict[str, Any] = {
            "num_beams": int(how.get("num_beams") or 1),
            "max_length": self._room(question, int(how.get("max_new_tokens") or _NEW_TOKENS)),
            "use_nucleus_sampling": samples,
        }
        if samples:
            options |= {"temperature": temperature, "top_p": float(how.get("top_p") or 1)}
        penalties = ("repetition_penalty", "length_penalty")
        return {**options, **{key: float(how[key]) for key in penalties if how.get(key) is not None}}

    def _room(self, question: Question, wanted: int) -> int:
        """New tokens that the language model has room for, ``wanted`` at most."""
        language = self.model.language
        if language.max_positions is None:
            return wanted
        num_soft = [self.model.num_soft_prompts(image) for image in question.images]
        if self._is_single(question):
            read = sum(num_soft) + language.num_read(self._prompt(question))
        else:
            parts = self._parts(question)
            row = (
                language.row_of_turns([Turn("user", tuple(parts))], True)
                if self.chat
                else language.row_of_parts(_segments(parts))
            )
            read = num_positions(row, num_soft)
        return max(1, min(wanted, language.max_positions - read))

    def _write(self, questions: Sequence[Question], options: dict[str, Any]) -> list[str]:
        samples = self._samples(questions)
        write = self.model.generate if "image" in samples else self.model.answer_turns
        return write(samples, **options)

    def _score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of questions of one form. What is asked several times is read once."""
        owners = [[q.key for q in questions].index(question.key) for question in questions]
        places = sorted(set(owners))
        asked = [questions[place] for place in places]
        samples = self._samples(questions, answers)
        prompts: Any = None
        if "image" in samples:
            distinct = self._samples(asked)
            distinct["instruction"] = [self._prompt(question) for question in asked]
            prompts = self.model.soft_prompts(distinct)
            prompts = prompts[[places.index(owner) for owner in owners]]
        found = self.model.sample_losses(samples, prompts)
        lengths = found["num_tokens"].tolist()
        longest = max(lengths)
        options = {"num_beams": 1, "min_length": 0, "repetition_penalty": 1.0, "length_penalty": 0.0}
        greedy = dict(zip(places, self._write(asked, {**options, "max_length": longest}), strict=True))
        return [
            (loss, greedy[owner].strip() == answer)
            for loss, owner, answer in zip(found["losses"].tolist(), owners, answers, strict=True)
        ]


def _visual(source: Any) -> VisualPart:
    """An image, or a video: its file, or a list of its frames."""
    name = source.lower() if isinstance(source, str) else ""
    return VisualPart(
        "video" if isinstance(source, list) or name.endswith(VIDEO_SUFFIXES) else "image", source
    )


def _segments(parts: Sequence[str | VisualPart]) -> list[Part]:
    return [Read(part) if isinstance(part, str) else Visual() for part in parts]


def _alike(keys: Sequence[Any]) -> list[list[int]]:
    """The places of equal keys, those of the first key first."""
    groups: list[list[int]] = []
    for place, key in enumerate(keys):
        group = next((group for group in groups if keys[group[0]] == key), None)
        groups.append([place]) if group is None else group.append(place)
    return groups


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """A text up to the first of several ends."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text

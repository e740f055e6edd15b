"""The half of a vision-language model that writes: captions, answers, the likeliest of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import DataError
from evlgen.common.precision import without_autocast
from evlgen.config.model_config import GenerationConfig
from evlgen.models.language import LanguageModel
from evlgen.models.pixels import with_pixels
from evlgen.models.prompts import ask, check_count, fill_ocr_slots
from evlgen.models.vision_model import VisionModel


class Writing(VisionModel):
    """Generation of texts behind soft prompts; `evlgen.models.vlm.VLM` is what has these.

    Attributes:
        generation: what the config says of generation.
    """

    #: What generation does where neither the caller nor ``model.generation`` says otherwise.
    GENERATION: ClassVar[GenerationConfig] = GenerationConfig(1.0, 0.0, 1.0)

    language: LanguageModel
    generation: GenerationConfig

    if TYPE_CHECKING:

        def soft_prompts(self, samples: Batch) -> Tensor: ...

        def _prompts_to_continue(self, samples: Batch) -> Tensor: ...

    @torch.no_grad()
    def generate(
        self,
        samples: Batch,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        use_nucleus_sampling: bool = False,
        repetition_penalty: float | None = None,
        length_penalty: float | None = None,
        num_captions: int = 1,
        temperature: float = 1.0,
        consensus: int | None = None,
    ) -> list[str]:
        """Texts for a batch of images.

        Args:
            samples: ``image`` [B, 3, H, W] or [B, 3, T, H, W], or a Pillow image or a list of them, which go
                through the model's eval processor (`pixels.pixels_of`); optionally ``prompt``, one string or
                one for each image, with a slot for ``ocr_tokens`` where the samples have them. In place of
                samples with nothing but images, the images.
            num_beams: beams of the search; 1 is greedy.
            max_length, min_length: number of *new* tokens at most and at least.
            use_nucleus_sampling: sample from the likeliest tokens of total probability ``top_p``, at
                ``temperature``, instead of searching.
            repetition_penalty, length_penalty: as in transformers' generation; None: as ``model.generation``
                says, or else the architecture (both 1; of Vicuna's the first 1.5).
            num_captions: texts for each image.
            consensus: how many texts are sampled for each image besides, so that what is written is what most
                of them agree on (`language.consensus`); 0: none; None: as ``model.generation`` says, or none
                where texts are sampled anyway.

        Returns:
            B x num_captions texts, those of one image in a row.
        """
        samples = with_pixels(self, samples)
        if consensus is None:
            consensus = 0 if use_nucleus_sampling else (self.generation.consensus or 0)
        agreed = (
            {"consensus": consensus} if consensus else {}
        )  # a language model of one's own may not know it
        return self._continue(
            samples,
            self._prompts(samples, count_images(samples)),
            **agreed,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            top_p=top_p,
            use_nucleus_sampling=use_nucleus_sampling,
            repetition_penalty=self._or_default(repetition_penalty, "repetition_penalty"),
            length_penalty=self._or_default(length_penalty, "length_penalty"),
            num_captions=num_captions,
            temperature=temperature,
        )

    @torch.no_grad()
    def generate_tokens(self, samples: Batch, consensus: int = 0, **options: Any) -> list[list[int]]:
        """As `generate`, the tokens of the texts, whose log-likelihoods `sample_losses` gives as
        ``text_tokens``; the last one of a text is an end token unless ``max_length`` cut it.

        Args:
            samples: as in `generate`.
            consensus: as in `generate`; 0: none, whatever ``model.generation`` says.
            options: fields of `generation.Decoding`. ``use_nucleus_sampling=True, top_p=1.0, top_k=None,
                min_length=0`` draws from the model's own distribution.
        """
        samples = with_pixels(self, samples)
        soft_prompts = self._prompts_to_continue(samples)
        with without_autocast(soft_prompts.device):
            prompts = self._prompts(samples, len(soft_prompts))
            if not consensus:
                return self.language.generate_tokens(soft_prompts, prompts, **options)
            return self.language.agreed_tokens(soft_prompts, prompts, consensus, **options)

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Batch,
        num_beams: int = 5,
        max_len: int = 10,
        min_len: int = 1,
        prompt: str = "",
        length_penalty: float | None = None,
        repetition_penalty: float | None = None,
    ) -> list[str]:
        """Short answers to questions.

        Args:
            samples: ``image`` as in `generate` and ``text_input``, the questions (one string
                or one for each image); ``choices`` or ``ocr_tokens``, a list of strings for each image,
                where the prompt has a second slot.
            max_len, min_len: number of new tokens at most and at least.
            prompt: a format with a slot for the question, ``Question: {} Short answer:``, or with two, see
                `prompts.ask`; empty asks the bare question.
            length_penalty, repetition_penalty: as in `generate`; the architectures' length penalty of answers
                is 0, T5's -1.
        """
        samples = with_pixels(self, samples)
        return self._continue(
            samples,
            ask(prompt, samples, count_images(samples)),
            num_beams=num_beams,
            max_length=max_len,
            min_length=min_len,
            length_penalty=self._or_default(length_penalty, "answer_length_penalty"),
            repetition_penalty=self._or_default(repetition_penalty, "repetition_penalty"),
        )

    @torch.no_grad()
    def rank_answers(
        self,
        samples: Batch,
        candidates: Sequence[str] | Sequence[Sequence[str]],
        prompt: str = "",
        num_candidates: int | None = None,
    ) -> list[str]:
        """The likeliest of several answers to each question, by the sum of the log-likelihoods of an answer's
        tokens and of its end (``rank_answers`` of LAVIS's ``blip_vqa``).

        Args:
            samples, prompt: as in `predict_answers`.
            candidates: one list of answers for all questions, or a list of its own for each.
            num_candidates: of how many answers all is read, those with the likeliest first tokens; None: of
                all.

        Raises:
            DataError: a question has no candidates.
            ConfigError: another number of lists than questions.
        """
        samples = with_pixels(self, samples)
        count = count_images(samples)
        is_one_list = all(isinstance(candidate, str) for candidate in candidates)
        lists = cast(Sequence[Sequence[str]], [candidates] * count if is_one_list else candidates)
        check_count(lists, count, "lists of candidate answers")
        if not all(map(len, lists)):
            raise DataError("there are no candidate answers to rank for a question: give at least one.")
        soft_prompts, prompts = self.soft_prompts(samples), ask(prompt, samples, count)
        with without_autocast(soft_prompts.device):
            found = self.language.log_likelihoods(soft_prompts, prompts, lists, num_candidates)
        return [answers[int(scores.argmax())] for answers, scores in zip(lists, found, strict=True)]

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `generate_tokens`."""
        return self.language.texts(tokens)

    def generation_default(self, key: str) -> float:
        """What generation does where the caller does not say: a setting of `GenerationConfig`, as the config
        has it, else as the architecture does."""
        own = vars(self.generation)[key]
        return vars(self.GENERATION)[key] if own is None else own

    def _or_default(self, value: float | None, key: str) -> float:
        return self.generation_default(key) if value is None else value

    def _prompts(self, samples: Batch, count: int) -> list[str]:
        """The prompt to continue of each of ``count`` images; see `generate`."""
        prompts = samples.get("prompt", self.prompt)
        if isinstance(prompts, str):
            prompts = [prompts] * count
        check_count(prompts, count, "prompts")
        return fill_ocr_slots(prompts, samples)

    def _continue(self, samples: Batch, prompts: list[str], **options: Any) -> list[str]:
        soft_prompts = self._prompts_to_continue(samples)
        with without_autocast(soft_prompts.device):
            return self.language.generate(soft_prompts, prompts, **options)


def count_images(samples: Batch) -> int:
    """The number of images in a batch."""
    return len(samples["visual_tokens"] if "visual_tokens" in samples else samples["image"])

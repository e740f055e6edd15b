"""Vision encoder -> connector -> language model: the one place where the three meet."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from evlgen.common.errors import ConfigError, DataError, EVLGenError
from evlgen.common.precision import without_autocast
from evlgen.common.registry import registry
from evlgen.config.model_config import GenerationConfig, ModelConfig
from evlgen.files.io import resolve
from evlgen.models.base_model import BaseModel, MissingAsset
from evlgen.models.chatting import pixels_of_visual
from evlgen.models.connectors.base import Connector, ConnectorInputs
from evlgen.models.language import CausalLanguageModel, LanguageModel, build_language_model
from evlgen.models.language.loading import find_model, read_config
from evlgen.models.language.loading import num_positions as most_positions
from evlgen.models.language.segments import (
    Row,
    SoftPrompts,
    cut,
    has_learned,
    num_positions,
    num_soft_of,
    num_visuals,
)
from evlgen.models.ops import use_fast_linear
from evlgen.models.pixels import pixels_of, with_pixels
from evlgen.models.prompts import ask, check_count, fill_ocr_slots
from evlgen.models.soft_prompts import SoftPromptHead
from evlgen.models.text_lengths import TextLengths
from evlgen.models.tiles import Tiling, as_prompts
from evlgen.models.vision import build_vision_encoder, vision_encoder_class
from evlgen.models.vision.base import VisionEncoder
from evlgen.models.vision.temporal import pool_frames, temporal_modules
from evlgen.processors.turns import check_turns, read_turns
from evlgen.weights.hub import looks_like_path, missing_model, with_settings
from evlgen.weights.hub_checkpoints import HUB_PREFIX

logger = logging.getLogger(__name__)

_LEAST_ROOM = 64  # positions of an answer that older turns make room for, where nothing is said
_ANSWER_LEN = 256  # new tokens of an answer in a conversation at most, where nothing is said


class VLM(BaseModel):
    """A visually conditioned language model. An architecture is a registered subclass that names its language
    model.

    Args:
        vision: pixels [B, 3, H, W] -> visual tokens [B, N, C_vision].
        connector: visual tokens -> soft prompts [B, M, C_language].
        language: reads soft prompts and text.
        prompt: the text before every caption.
        freeze_vision, freeze_language: what is not trained, but for the parts' own `trained_modules`.
        prompt_head: what is added around the connector's output; None: nothing.
        temporal: how the frames of a video become one set of visual tokens, see `TemporalConfig`; None for a
            model of images.
    """

    LANGUAGE_MODEL: ClassVar[str]
    TEMPORAL: ClassVar[str | None] = None  # the form of a video architecture whose YAML names none
    #: What generation does where neither the caller nor ``model.generation`` says otherwise.
    GENERATION: ClassVar[GenerationConfig] = GenerationConfig(1.0, 0.0, 1.0)

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Connector,
        language: LanguageModel,
        prompt: str = "",
        freeze_vision: bool = True,
        freeze_language: bool = True,
        temporal: str | None = None,
        prompt_head: SoftPromptHead | None = None,
    ) -> None:
        super().__init__()
        self.temporal = temporal
        self.vision = vision
        self.ln_vision = nn.LayerNorm(vision.embed_dim, eps=1e-5)
        self.connector = connector
        self.prompt_head = prompt_head
        self.tiling: Tiling | None = None
        self.language = language
        self.prompt = prompt
        self.generation = GenerationConfig()
        self.max_sequence_len = ModelConfig.max_sequence_len
        self._frozen = [
            name for name, freeze in (("vision", freeze_vision), ("language", freeze_language)) if freeze
        ]
        for module in self.frozen_modules():
            module.requires_grad_(False)
        for module in self.trained_modules():
            module.requires_grad_(True)
        use_fast_linear(self)

    @classmethod
    def from_parts_config(cls, cfg: ModelConfig, device: torch.device) -> VLM:
        """Builds the three parts a config names. See `ModelConfig`."""
        connector_args = dict(cfg.connector)
        connector_class = registry.get_connector_class(connector_args.pop("name", "tomeformer"))
        temporal = cfg.vision.temporal.form if cfg.vision.temporal else cls.TEMPORAL
        vision = build_vision_encoder(cfg.vision, device, temporal)
        language = build_language_model(cfg, cls.LANGUAGE_MODEL, device)
        embedding_rms = language.embedding_rms()
        connector = connector_class.build(
            ConnectorInputs.behind(vision, language.embed_dim, embedding_rms), **connector_args
        )
        head = None
        if cfg.soft_prompts is not None:
            count = connector.num_soft_prompts(vision.num_tokens)
            head = SoftPromptHead(count, language.embed_dim, embedding_rms, cfg.soft_prompts.scale)
        model = cls(
            *(vision, connector, language, cfg.prompt, cfg.vision.freeze, cfg.language.freeze, temporal),
            **({} if head is None else {"prompt_head": head}),  # subclasses may not know it
        )
        if cfg.vision.norm_eps is None:
            model.ln_vision = nn.Identity()
        else:
            model.ln_vision.eps = cfg.vision.norm_eps
        model.tiling = Tiling.build(cfg, vision, language.embed_dim, embedding_rms, temporal)
        if model.tiling is not None and not isinstance(language, CausalLanguageModel):
            raise ConfigError(
                "model.vision.tiles: images have different numbers of soft prompts, which needs a decoder. "
                "Set model.language.name to one."
            )
        model.generation = cfg.generation
        model.max_sequence_len = cfg.max_sequence_len
        model._log_parts()
        return model

    @classmethod
    def missing(cls, cfg: ModelConfig) -> list[MissingAsset]:
        """Weights the config names that are not on this machine."""
        vision, language, start = cfg.vision, cfg.language.name, cfg.connector.get("init")
        encoder = vision_encoder_class(vision.name)
        found = [
            MissingAsset(
                f"vision encoder {vision.name}", encoder.missing(vision.pretrained), vision.pretrained is True
            ),
            MissingAsset(
                f"language model {language}", missing_model(language), not looks_like_path(language)
            ),
        ]
        if start:
            found.append(
                MissingAsset(f"connector start {start}", missing_model(start), not looks_like_path(start))
            )
        if cfg.checkpoint and not cfg.checkpoint.startswith(("http://", "https://", HUB_PREFIX)):
            if not os.path.exists(resolve(cfg.checkpoint)):
                why = "there is no such file or folder; see model.checkpoint"
                found.append(MissingAsset(f"checkpoint {cfg.checkpoint}", why, False))
        named = (vision.pretrained, language, start)
        if any(item.why for item in found) and any("cache://parts/" in str(part) for part in named):
            why = "bash run_scripts/photos/get_parts.sh fetches them"
            found.append(MissingAsset("the small parts", why, False))
        return [item for item in found if item.why]

    @classmethod
    def text_lengths(cls, cfg: ModelConfig) -> TextLengths | None:
        if missing_model(cfg.language.name):
            return None
        language = cls._language_without_weights(cfg)
        if not hasattr(language, "to_learn"):
            return None
        form = cfg.vision.temporal.form if cfg.vision.temporal else cls.TEMPORAL
        num_soft = cls._num_soft_prompts(cfg, language.embed_dim)

        tiling = None
        if cfg.vision.tiles is not None:
            tiling = Tiling(cfg.vision.tiles, cfg.vision.image_size, 1, 1.0)
            of_views = functools.cache(lambda views: cls._num_soft_prompts(cfg, language.embed_dim, views))

        def num_soft_of_shape(shape: Sequence[int]) -> int:
            if tiling is not None:
                return tiling.num_soft(shape, of_views)
            return num_soft * (shape[1] if form == "concat" and len(shape) == 4 else 1)

        limit = min(cfg.max_sequence_len, language.max_positions or cfg.max_sequence_len)
        return TextLengths(language, num_soft_of_shape, limit)

    @classmethod
    def check_room(cls, cfg: ModelConfig, prompt: str | None, num_new: int, learns: bool) -> None:
        name = with_settings(cfg.language.name)
        if name is None:
            return
        cfg = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, name=name))
        limit = most_positions(read_config(name, find_model(name)))
        # nearly all models have far more room than is needed: seen without building anything
        texts = len((prompt or "").encode()) + cfg.max_txt_len + (cfg.max_output_txt_len or cfg.max_txt_len)
        around = 256 if cfg.language.chat_template else 8  # tokens of a template, of a start
        # of queries, maybe
        counts = [n for key, n in cfg.connector.items() if key.startswith("num_") and isinstance(n, int)]
        views = 1 if cfg.vision.tiles is None else cfg.vision.tiles.max + 1
        most = views * max((cfg.vision.image_size // 8) ** 2, *counts, 0)
        if limit is not None and texts + around + num_new + most > limit:
            language = cls._language_without_weights(cfg)
            num_soft = cls._num_soft_prompts(cfg, language.embed_dim)
            if (tiles := cfg.vision.tiles) is not None:
                tiling = Tiling(tiles, cfg.vision.image_size, 1, 1.0)
                num_soft = tiling.most_soft(
                    lambda views: cls._num_soft_prompts(cfg, language.embed_dim, views)
                )
            language.check_room(num_soft, prompt, num_new, learns)

    @classmethod
    def _language_without_weights(cls, cfg: ModelConfig) -> LanguageModel:
        plain = dataclasses.replace(cfg.language, freeze=True, quantization="none", lora=None)
        return build_language_model(
            dataclasses.replace(cfg, language=plain), cls.LANGUAGE_MODEL, torch.device("meta")
        )

    @staticmethod
    def _num_soft_prompts(cfg: ModelConfig, language_dim: int, views: int = 1) -> int:
        """The soft prompts of an image (of a video, of a frame; of ``views`` in a row); 1 where weights are
        needed to tell."""
        settings = {key: value for key, value in cfg.connector.items() if key not in ("name", "init")}
        try:
            with torch.device("meta"):
                plain = dataclasses.replace(cfg.vision, pretrained=False, grad_checkpoint=False)
                vision = build_vision_encoder(plain, "meta")
                connector_class = registry.get_connector_class(cfg.connector.get("name", "tomeformer"))
                connector = connector_class.build(
                    ConnectorInputs.behind(vision, language_dim, 1.0), **settings
                )
            return connector.num_soft_prompts(views * vision.num_tokens)
        except (EVLGenError, ArithmeticError, RuntimeError, TypeError, ValueError):
            return 1  # a part of a plugin, which may do anything; what is wrong is said when it is built

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """The next-token loss of a batch.

        Args:
            samples: ``image`` [B, 3, H, W], of a video [B, 3, T, H, W] (or ``visual_tokens``, see
                `soft_prompts`); ``text_input`` list[str] to learn; with ``text_output`` list[str] that is
                learned and ``text_input`` only read. ``num_texts`` list[int]: how many of the N texts belong
                to each image, whose soft prompts are then read once for all of them; without it, one. With
                ``text_weights`` [N], one for each text, the loss is the weighted sum of the texts' negated
                log-likelihoods, by image. ``text_tokens``, N texts of `generate_tokens`, may stand in place
                of ``text_input``.

                Samples that are sequences have ``segments`` in place of all these, a list of `Read`, `Learn`
                and `Visual` for each, or ``messages``, a conversation for each (`evlgen.processors.turns`);
                and ``images``: the images [3, H, W] and videos [3, T, H, W] of each, none, one or several,
                in the order of their places. Without ``images``, ``image`` has one for each.

        Returns:
            ``loss``: scalar, float32; ``num_tokens``: how many tokens it is the mean of, and with
            ``text_weights`` how many images.
        """
        if "text_weights" in samples:
            return self._weighted_loss(samples)
        if is_sequence(samples):
            rows, soft_prompts = self._rows(samples, self.sequence_prompts(samples))
            with self._own_precision(self.device):
                loss, num_tokens = self.language.rows_loss(soft_prompts, rows)
            return {"loss": loss, "num_tokens": num_tokens}
        soft_prompts = self.soft_prompts(samples)
        counts = self._text_counts(samples, len(soft_prompts))
        with self._own_precision(soft_prompts.device):
            loss, num_tokens = self.language.loss(
                soft_prompts, samples["text_input"], samples.get("text_output"), **_several(counts)
            )
        return {"loss": loss, "num_tokens": num_tokens}

    def _weighted_loss(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """What `forward` gives for texts that weigh differently, such as the answers of several people."""
        losses = self.sample_losses(samples)["losses"]
        _check_length("text_weights", samples["text_weights"], len(losses), "texts")
        weights = torch.as_tensor(samples["text_weights"], dtype=losses.dtype, device=losses.device)
        num_pictures = _count(samples)
        return {"loss": (weights * losses).sum() / num_pictures, "num_tokens": num_pictures}

    def sample_losses(self, samples: dict[str, Any], soft_prompts: Tensor | None = None) -> dict[str, Tensor]:
        """As `forward`, of each text by itself.

        Args:
            samples: as in `forward`; N texts with ``num_texts``, else one for each image. With
                ``text_tokens`` also ``prompt``, as in `generate`.
            soft_prompts: of the images, [B, M, C_language], where they are known already; ``samples`` then
                needs no pixels.

        Returns:
            ``losses``: [N], float32, the sum over each text's tokens: its negated log-likelihood;
            ``num_tokens``: [N].

        Raises:
            DataError: the texts are not as many as the images, or as ``num_texts`` says.
        """
        if is_sequence(samples):
            prompts = self.sequence_prompts(samples) if soft_prompts is None else soft_prompts
            rows, prompts = self._rows(samples, prompts)
            with self._own_precision(self.device):
                found = self.language.rows_losses(prompts, rows)
            return dict(zip(("losses", "num_tokens"), found, strict=True))
        soft_prompts = self.soft_prompts(samples) if soft_prompts is None else soft_prompts
        counts = self._text_counts(samples, len(soft_prompts))
        with self._own_precision(soft_prompts.device):
            if "text_tokens" in samples:
                pairs = zip(self._prompts(samples, len(counts)), counts, strict=True)
                prompts = [prompt for prompt, count in pairs for _ in range(count)]
                found = self.language.token_losses(
                    soft_prompts, prompts, samples["text_tokens"], **_several(counts)
                )
            else:
                found = self.language.sample_losses(
                    soft_prompts, samples["text_input"], samples.get("text_output"), **_several(counts)
                )
        return dict(zip(("losses", "num_tokens"), found, strict=True))

    @staticmethod
    def _text_counts(samples: dict[str, Any], num_images: int) -> list[int]:
        """How many texts each image has. Raises `DataError` where the texts are not as many."""
        counts = samples.get("num_texts", [1] * num_images)
        _check_length("num_texts", counts, num_images, "images")
        for key in ("text_input", "text_output", "text_tokens"):
            if key in samples:
                _check_length(key, samples[key], sum(counts), "texts, by num_texts or one an image")
        return counts

    def sequence_prompts(self, samples: dict[str, Any]) -> SoftPrompts:
        """The soft prompts of all images and videos of samples that are sequences, in their order: [K, M,
        C_language], or K tensors [M, C_language] where the numbers differ.

        Without any image, K is 0, and all that is trained takes part all the same, as DDP and a
        standardisation over processes want it.
        """
        if "images" not in samples and _has_image(samples):
            return self.soft_prompts(samples)
        images = [image.to(self.device) for of_one in samples.get("images", []) for image in of_one]
        if images:
            return self._connect(self._encode_each(images)) if self.tiling is None else self._tiled(images)
        size = self.vision.image_size
        learns = any(p.requires_grad for p in self.vision.parameters())
        tokens = (
            self.encode(torch.zeros(1, 3, size, size, device=self.device))
            if learns
            else torch.zeros(1, self.vision.num_tokens, self.vision.embed_dim, device=self.device)
        )
        prompts = self._with_head(self.connector(self._normed(tokens))[:0])
        has_markers = self.tiling is not None and self.tiling.marker is not None
        return prompts + self.tiling.marker if has_markers else prompts

    def _encode_each(self, images: list[Tensor]) -> list[Tensor]:
        """The tokens [N, C_vision] of images and videos of any lengths, those of one shape together."""
        found: dict[int, Tensor] = {}
        for places in _alike(images):
            tokens = self.encode(torch.stack([images[place] for place in places]))
            found.update(zip(places, tokens, strict=True))
        return [found[place] for place in range(len(images))]

    def _connect(self, tokens: list[Tensor]) -> SoftPrompts:
        """Soft prompts of the tokens of `_encode_each`."""
        groups = _alike(tokens)
        prompts = [self._to_prompts(torch.stack([tokens[place] for place in places])) for places in groups]
        if len(groups) == 1:
            return prompts[0]
        found: dict[int, Tensor] = {}
        for places, of_group in zip(groups, prompts, strict=True):
            found.update(zip(places, of_group, strict=True))
        return [found[place] for place in range(len(tokens))]

    def _tiled(self, images: Sequence[Tensor]) -> SoftPrompts:
        """The soft prompts of images [3, H, W] that are grids of tiles; see `Tiling`."""
        assert self.tiling is not None
        views = [self.tiling.cut(image.to(self.device)) for image in images]
        counts = [len(of_one) for of_one in views]
        tokens = self.encode_frames(torch.cat(views).to(next(self.vision.parameters()).dtype), 1)  # [V, N, C]
        if self.tiling.join == "before":
            return as_prompts(self._connect([of_one.flatten(0, 1) for of_one in tokens.split(counts)]))
        grids = [self.tiling.grid_of(image.shape) for image in images]
        parts = zip(self._to_prompts(tokens).split(counts), grids, strict=True)
        return as_prompts([self.tiling.joined(prompts, grid) for prompts, grid in parts])

    def _to_prompts(self, tokens: Tensor) -> Tensor:
        """The encoder's tokens [B, N, C_vision] -> [B, M, C_language]."""
        return self._with_head(self.connector(self._normed(tokens)))

    def _with_head(self, prompts: Tensor) -> Tensor:
        return prompts if self.prompt_head is None else self.prompt_head(prompts)

    def _rows(
        self, samples: dict[str, Any], soft_prompts: SoftPrompts, room: int | None = None
    ) -> tuple[list[Row], SoftPrompts]:
        """Samples that are sequences as the language model reads them, and the soft prompts that stand in
        them.

        Args:
            room: None to learn the samples: they lose what is beyond ``max_sequence_len`` positions. Else
                the assistant's next turn begins behind them, and conversations lose their oldest turns, so
                that it has ``room`` positions.

        Raises:
            DataError: a sample has more places of images than images, or fewer; and see `check_turns`.
        """
        num_soft = num_soft_of(soft_prompts)
        rows, kept, first = [], [], 0
        for number in range(_num_sequences(samples)):
            row = self._row(samples, number, answers_next=room is not None)
            end = first + num_visuals(row)
            if room is None:
                row = cut(row, num_soft[first:end], self._most_positions)
                kept += range(first, first + num_visuals(row))
            else:
                row, own = self._recent(samples, number, row, num_soft[first:end], room)
                kept += [first + place for place in own]
            rows.append(row)
            first = end
        if len(kept) == len(num_soft):
            return rows, soft_prompts
        is_stacked = isinstance(soft_prompts, Tensor)
        return rows, soft_prompts[kept] if is_stacked else [soft_prompts[place] for place in kept]

    def _row(self, samples: dict[str, Any], number: int, answers_next: bool = False) -> Row:
        """A sample of `_rows`, whole."""
        if "segments" in samples:
            row = self.language.row_of_parts(samples["segments"][number])
        else:
            turns = read_turns(samples["messages"][number])
            check_turns(turns, learns=not answers_next)
            row = self.language.row_of_turns(turns, answers_next)
        given = len(samples["images"][number]) if "images" in samples else int(_has_image(samples))
        if (places := num_visuals(row)) != given:
            raise DataError(
                f"a sample has {places} places of images and {given} images: there must be one for each.",
                "images without places" if given > places else "places without images",
            )
        return row

    def _recent(
        self, samples: dict[str, Any], number: int, row: Row, num_soft: list[int], room: int
    ) -> tuple[Row, list[int]]:
        """A conversation without so many of its oldest turns, but for the system's, that ``room`` positions
        are left behind it; and which of its images are in the rest."""
        most = self.language.max_positions
        turns = read_turns(samples["messages"][number]) if "messages" in samples else []
        counts = [len(turn.visuals) for turn in turns]
        first = start = sum(turn.role == "system" for turn in turns[:1])
        kept = list(range(len(num_soft)))
        while most and num_positions(row, [num_soft[i] for i in kept]) + room > most:
            first = next((i for i in range(first + 1, len(turns)) if turns[i].role == "user"), None)
            if first is None:
                break  # the last question alone: generation names what is too long
            row = self.language.row_of_turns([*turns[:start], *turns[first:]], True)
            kept = [*range(sum(counts[:start])), *range(sum(counts[:first]), sum(counts))]
            logger.warning("a conversation is too long: its turns before turn %d are left out", first + 1)
        return row, kept

    @property
    def _most_positions(self) -> int:
        return min(self.max_sequence_len, self.language.max_positions or self.max_sequence_len)

    def _sequences_not_learnable(self, samples: dict[str, Any]) -> dict[int, str]:
        found = {}
        for number in range(_num_sequences(samples)):
            try:
                row = self._row(samples, number)
            except DataError as error:
                found[number] = str(error)
                continue
            images = samples.get("images") or [[image] for image in samples.get("image", [])]
            num_soft = [self._num_soft(image) for image in images[number]] if images else []
            if not has_learned(cut(row, num_soft, self._most_positions)):
                found[number] = (
                    f"nothing of an answer is within the {self._most_positions} positions of "
                    "model.max_sequence_len"
                )
        return found

    def _num_soft(self, image: Tensor) -> int:
        """The soft prompts of an image [3, H, W] or a video [3, T, H, W]."""
        if self.tiling is not None:
            num_tokens = self.vision.num_tokens
            return self.tiling.num_soft(
                image.shape, lambda n: self.connector.num_soft_prompts(n * num_tokens)
            )
        frames = image.shape[1] if image.ndim == 4 and self.temporal == "concat" else 1
        return self.connector.num_soft_prompts(self.vision.num_tokens * frames)

    def not_learnable(self, samples: dict[str, Any]) -> dict[int, str]:
        if is_sequence(samples):
            return self._sequences_not_learnable(samples)
        if "text_output" not in samples:
            return {}
        lost = self.language.without_answer(samples["text_input"], samples["text_output"])
        if not lost:
            return {}
        counts = samples.get("num_texts", [1] * len(samples["text_input"]))
        sample_of = [sample for sample, count in enumerate(counts) for _ in range(count)]
        lost_of = Counter(sample_of[place] for place in lost)
        limit = self.language.max_txt_len
        why = f"its question takes all {limit} tokens of model.max_txt_len: nothing of an answer is left"
        return {sample: why for sample, count in lost_of.items() if count == counts[sample]}

    def soft_prompts(self, samples: dict[str, Any]) -> Tensor:
        """``image`` [B, 3, H, W] or [B, 3, T, H, W], or in its place ``visual_tokens`` [B, N, C_vision] that
        `encode` gave earlier -> soft prompts [B, M, C_language]. Of ``images`` see `sequence_prompts`."""
        if "images" in samples:
            return self.sequence_prompts(samples)
        if self.tiling is not None and "image" in samples:
            return cast(Tensor, self._tiled([*samples["image"]]))
        tokens = samples.get("visual_tokens")
        tokens = self.encode(samples["image"]) if tokens is None else tokens.to(self.device)
        return self._to_prompts(tokens)

    def encoded(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Samples that are read more than once: ``visual_tokens`` in place of ``image``, so that the encoder
        runs once; as they are where it learns, or reads tiles."""
        if (
            "image" not in samples
            or self.tiling is not None
            or any(p.requires_grad for p in self.vision.parameters())
        ):
            return samples
        rest = {key: value for key, value in samples.items() if key != "image"}
        return {**rest, "visual_tokens": self.encode(samples["image"])}

    def visual_tokens(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] or [B, 3, T, H, W] -> the encoder's tokens after ``ln_vision``, [B, N, C_vision]."""
        return self._normed(self.encode(image))

    def encode(self, image: Tensor) -> Tensor:
        """The encoder's own tokens, in the type its weights are kept in.

        Where the encoder is frozen they are the same at every step, and may be kept: see
        `evlgen.vision_cache.cache`.

        Args:
            image: [B, 3, H, W], or videos [B, 3, T, H, W] where the model is one of videos; to such a model a
                image is a video of one frame. Or Pillow images, see `generate`.

        Returns:
            [B, N, C_vision]; with ``temporal: concat`` [B, T * N, C_vision].

        Raises:
            ConfigError: videos for a model of images.
            DataError: images of another size, another number of dimensions, videos without a frame.
        """
        image = image if isinstance(image, Tensor) else pixels_of(self, image)
        self._check_image(image)
        frames = image.to(self.device, next(self.vision.parameters()).dtype)
        num_frames = 1
        if image.ndim == 5:
            num_frames = image.shape[2]
            frames = frames.transpose(1, 2).flatten(0, 1)  # [B * T, 3, H, W]
        tokens = self.encode_frames(frames, num_frames)
        return tokens if num_frames == 1 else pool_frames(tokens, num_frames, self.temporal)

    def encode_frames(self, frames: Tensor, num_frames: int) -> Tensor:
        """The tokens of every frame of videos: [B * T, 3, H, W], a video's frames in a row -> [B * T, N,
        C_vision]."""
        for module in temporal_modules(self.vision):
            module.num_frames = num_frames
        if "vision" not in self._frozen:
            return self.vision(frames)
        learns = torch.is_grad_enabled() and bool(self.vision.trained_modules())
        with torch.set_grad_enabled(learns), self._own_precision(frames.device):
            return self.vision(frames)

    def _check_image(self, image: Tensor) -> None:
        """Raises `DataError` for another shape than [B, 3, H, W] or [B, 3, T, H, W] of the encoder's size,
        `ConfigError` for videos where the model is one of images."""
        size, shape = self.vision.image_size, list(image.shape)
        if image.ndim not in (4, 5) or shape[1] != 3:
            raise DataError(
                f"image has shape {shape}: it must be [B, 3, H, W], or [B, 3, T, H, W] for videos. One "
                "image is a batch of one: image.unsqueeze(0)."
            )
        if shape[-2:] != [size, size]:
            raise DataError(
                f"image has shape {shape}, and the vision encoder reads {size} x {size} pixels "
                "(model.vision.image_size). Give the processors the same image_size."
            )
        if image.ndim == 5 and self.temporal is None:
            raise ConfigError(
                "this is a model of images, and a video was given to it. Set model.vision.temporal: "
                "{form: average}, or take an architecture of videos, such as evlgen_video_opt."
            )
        if image.ndim == 5 and shape[2] == 0:
            raise DataError(f"image has shape {shape}: a video needs at least one frame.")

    def _normed(self, tokens: Tensor) -> Tensor:
        weights = self.connector if isinstance(self.ln_vision, nn.Identity) else self.ln_vision
        return self.ln_vision(tokens.to(next(weights.parameters()).dtype))

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        use_nucleus_sampling: bool = False,
        repetition_penalty: float | None = None,
        length_penalty: float | None = None,
        num_captions: int = 1,
        temperature: float = 1.0,
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

        Returns:
            B x num_captions texts, those of one image in a row.
        """
        samples = with_pixels(self, samples)
        return self._continue(
            samples,
            self._prompts(samples, _count(samples)),
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
    def generate_tokens(self, samples: dict[str, Any], **options) -> list[list[int]]:
        """As `generate`, the tokens of the texts, whose log-likelihoods `sample_losses` gives as
        ``text_tokens``; the last one of a text is an end token unless ``max_length`` cut it.

        Args:
            samples: as in `generate`.
            options: fields of `generation.Decoding`. ``use_nucleus_sampling=True, top_p=1.0, top_k=None,
                min_length=0`` draws from the model's own distribution.
        """
        soft_prompts = self.soft_prompts(samples)
        with self._own_precision(soft_prompts.device):
            prompts = self._prompts(samples, len(soft_prompts))
            return self.language.generate_tokens(soft_prompts, prompts, **options)

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
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
            ask(prompt, samples, _count(samples)),
            num_beams=num_beams,
            max_length=max_len,
            min_length=min_len,
            length_penalty=self._or_default(length_penalty, "answer_length_penalty"),
            repetition_penalty=self._or_default(repetition_penalty, "repetition_penalty"),
        )

    def answer_turns(self, samples: dict[str, Any], **options) -> list[str]:
        """The assistant's next turn of each conversation of a batch.

        Args:
            samples: ``messages`` and ``images`` as in `forward`, up to a user's turn.
            options: as of `generate`; ``num_beams`` is 1 unless given, ``max_length`` 256, or what
                there is room for.
        """
        return self.texts(self.answer_turns_tokens(samples, **options))

    @torch.no_grad()
    def answer_turns_tokens(self, samples: dict[str, Any], **options) -> list[list[int]]:
        """As `answer_turns`, the tokens: the last one of a turn is an end token unless ``max_length`` cut
        it."""
        room = options.get("max_length") or _LEAST_ROOM
        rows, soft_prompts = self._rows(samples, self.sequence_prompts(samples), room)
        with self._own_precision(self.device):
            options = self._chat_options(options, rows, soft_prompts)
            return self.language.continue_rows(soft_prompts, rows, **options)

    def chat(
        self, messages: Sequence[Any], stream: bool = False, num_frames: int = 4, **options
    ) -> str | Iterator[str]:
        """What the assistant says next.

        Args:
            messages: ``[{"role": "user", "content": ..}, ..]``, up to a user's turn, where ``content`` is a
                text or a list of ``{"type": "text", "text": ..}``, ``{"type": "image", "image": ..}`` and
                ``{"type": "video", "video": ..}``: paths, addresses, Pillow images, frames in a list, pixels.
            stream: give the text piece by piece, as it is written: an iterator, whose pieces together are
                the text.
            num_frames: of a video file.
            options: as of `answer_turns`.

        Raises:
            DataError: the turns are none, or an image cannot be read.
            ConfigError: a video for a model of images; a question that the language model has no room for.
                Older turns are left out where they leave none.
        """
        turns = read_turns(messages)
        check_turns(turns, learns=False)
        if turns[-1].role != "user":
            raise DataError(
                f"the conversation ends with the {turns[-1].role}'s turn: the last one must be the user's."
            )
        visuals = [visual for turn in turns for visual in turn.visuals]
        images = [pixels_of_visual(self, visual, num_frames) for visual in visuals]
        samples = {"messages": [turns], "images": [images]}
        return self._streamed(samples, options) if stream else self.answer_turns(samples, **options)[0]

    @torch.no_grad()
    def _streamed(self, samples: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
        room = options.get("max_length") or _LEAST_ROOM
        (row,), soft_prompts = self._rows(samples, self.sequence_prompts(samples), room)
        options = self._chat_options(options, [row], soft_prompts)
        shown = ""
        with self._own_precision(self.device):
            for tokens in self.language.stream_row(soft_prompts, row, **options):
                text = self.language.texts([tokens])[0]
                is_whole = not text.endswith("\ufffd")  # else half of a character
                if is_whole and text != shown and text.startswith(shown):
                    yield text[len(shown) :]
                    shown = text
        if text.startswith(shown) and text != shown:
            yield text[len(shown) :]

    def _chat_options(
        self, options: dict[str, Any], rows: list[Row], soft_prompts: SoftPrompts
    ) -> dict[str, Any]:
        options = dict(options)
        penalties = {
            key: self._or_default(options.pop(key, None), key)
            for key in ("repetition_penalty", "length_penalty")
        }
        if options.get("max_length") is None:
            counts = iter(num_soft_of(soft_prompts))
            longest = max(num_positions(row, list(islice(counts, num_visuals(row)))) for row in rows)
            room = (self.language.max_positions or math.inf) - longest
            options["max_length"] = int(max(1, min(_ANSWER_LEN, room)))
        return {"num_beams": 1, **penalties, **options}

    @torch.no_grad()
    def rank_answers(
        self,
        samples: dict[str, Any],
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
        count = _count(samples)
        is_one_list = all(isinstance(candidate, str) for candidate in candidates)
        lists = [candidates] * count if is_one_list else candidates
        check_count(lists, count, "lists of candidate answers")
        if not all(map(len, lists)):
            raise DataError("there are no candidate answers to rank for a question: give at least one.")
        soft_prompts, prompts = self.soft_prompts(samples), ask(prompt, samples, count)
        with self._own_precision(soft_prompts.device):
            found = self.language.log_likelihoods(soft_prompts, prompts, lists, num_candidates)
        return [answers[int(scores.argmax())] for answers, scores in zip(lists, found, strict=True)]

    def lr_scales(self) -> dict[str, float]:
        parts = {"connector": self.connector, "prompt_head": self.prompt_head}
        return {
            f"{name}.{key}": factor
            for name, part in parts.items()
            if hasattr(part, "lr_scales")
            for key, factor in part.lr_scales().items()
        }

    def frozen_modules(self) -> list[nn.Module]:
        """The frozen parts."""
        return [getattr(self, name) for name in self._frozen]

    def trained_modules(self) -> list[nn.Module]:
        """Modules inside frozen parts that are trained nonetheless."""
        return [module for part in self.frozen_modules() for module in part.trained_modules()]

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `generate_tokens`."""
        return self.language.texts(tokens)

    def _prompts(self, samples: dict[str, Any], count: int) -> list[str]:
        """The prompt to continue of each of ``count`` images; see `generate`."""
        prompts = samples.get("prompt", self.prompt)
        if isinstance(prompts, str):
            prompts = [prompts] * count
        check_count(prompts, count, "prompts")
        return fill_ocr_slots(prompts, samples)

    def _or_default(self, value: float | None, key: str) -> float:
        """An option of generation: as given, else as the config says, else as the architecture does."""
        for config in (self.generation, self.GENERATION):
            value = getattr(config, key) if value is None else value
        return value

    def _continue(self, samples: dict[str, Any], prompts: list[str], **options) -> list[str]:
        soft_prompts = self.soft_prompts(samples)
        with self._own_precision(soft_prompts.device):
            return self.language.generate(soft_prompts, prompts, **options)

    @staticmethod
    def _own_precision(device: torch.device) -> contextlib.AbstractContextManager:
        """Frozen parts compute in the type their weights are kept in: autocast would convert all of them at
        every step."""
        return without_autocast(device)

    def _log_parts(self) -> None:
        for name in ("vision", "connector", "language"):
            weights = list(getattr(self, name).parameters())
            learned = sum(p.numel() for p in weights if p.requires_grad)
            inside = f", but for {learned / 1e6:.3g} million" if name in self._frozen and learned else ""
            logger.info(
                "%s: %.3g million weights, %s%s, %s",
                name,
                sum(p.numel() for p in weights) / 1e6,
                "frozen" if name in self._frozen else "trained",
                inside,
                str(weights[0].dtype).removeprefix("torch."),
            )


def _check_length(key: str, values: Sized, count: int, what: str) -> None:
    """Raises `DataError` unless a sample's key has ``count`` values."""
    if len(values) != count:
        raise DataError(f"'{key}' has {len(values)} values, and there are {count} {what}.")


def is_sequence(samples: dict[str, Any]) -> bool:
    """Whether samples are sequences of texts and images, or conversations; see `VLM.forward`."""
    return "messages" in samples or "segments" in samples


def _num_sequences(samples: dict[str, Any]) -> int:
    return len(samples["segments" if "segments" in samples else "messages"])


def _has_image(samples: dict[str, Any]) -> bool:
    return "image" in samples or "visual_tokens" in samples


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors of the same shape, those of the first shape first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault(tuple(tensor.shape), []).append(place)
    return list(groups.values())


def _several(counts: list[int]) -> dict[str, Any]:
    """The argument ``num_texts`` of a language model, where an image has several."""
    return {} if all(count == 1 for count in counts) else {"num_texts": counts}


def _count(samples: dict[str, Any]) -> int:
    """The number of images in a batch."""
    return len(samples["visual_tokens"] if "visual_tokens" in samples else samples["image"])

"""BLIP-2's first stage: a Q-Former learns what to look at, before there is a language model.

Li et al., *BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models*, 2023 (arXiv 2301.12597), section 3.2. Three losses are summed: image-text contrast, image-text
matching with hard negatives, and image-grounded writing. Where the paper is silent the numbers are those of
salesforce/LAVIS, lavis/models/blip2_models: label smoothing 0.1 in contrast (`blip2_qformer.py`) and in
writing (`Qformer.py`), a temperature that starts at 0.07.

Unlike there, features of other processes get their gradients, so that several processes learn what one would
from all their samples; and pairs of the same image (``image_id``) are right partners of each other.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.precision import without_autocast
from evlgen.common.registry import registry
from evlgen.config.model_config import ArchitectureConfig
from evlgen.config.schema import PositiveInt
from evlgen.models.connectors.base import ConnectorInputs
from evlgen.models.connectors.bert_weights import bert_sizes
from evlgen.models.connectors.qformer import QFormer
from evlgen.models.connectors.qformer_text import (
    QFormerText,
    QFormerTokenizer,
    encode_multimodal,
    generate,
    read_text,
    write,
)
from evlgen.models.image_text_losses import (
    GlobalBatch,
    contrastive_loss,
    hard_negatives,
    image_keys,
    positives,
    similarities,
)
from evlgen.models.language.generation import Decoding
from evlgen.models.pixels import with_pixels
from evlgen.models.prompts import texts_to_learn
from evlgen.models.text_lengths import TextLengths
from evlgen.models.vision import build_vision_encoder
from evlgen.models.vision.base import VisionEncoder
from evlgen.models.vision_model import VisionModel
from evlgen.weights.hub import missing_model, with_settings

logger = logging.getLogger(__name__)

LABEL_SMOOTHING = 0.1  # LAVIS: blip2_qformer.py (contrast), Qformer.py (writing)
TEMPERATURE = 0.07  # LAVIS: blip2_qformer.py
TEMPERATURES = (0.001, 0.5)  # bounds it is kept in: those of LAVIS's blip_pretrain.py, BLIP-2's has none
UNKNOWN = -100  # label of pairs that are none
SECOND_STAGE = (
    "Take model.arch: blip2_opt, blip2_vicuna or blip2_t5, and this model's weights as its model.checkpoint."
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How the first stage reads and writes text.

    Args:
        tokenizer: hub id or folder of a tokenizer; published: BERT's own.
        max_position_embeddings: tokens of a text at most; null: as many as the BERT has positions (512).
    """

    tokenizer: str = "bert-base-uncased"
    max_position_embeddings: PositiveInt | None = None


@dataclasses.dataclass(frozen=True)
class Stage1Config(ArchitectureConfig):
    """The ``model`` section of BLIP-2's first stage.

    Args:
        connector: ``name: qformer`` and that connector's parameters.
        text: how text is read.
        embed_dim: channels of the features that are contrasted.
        prompt: the text before every caption, in training and generation; published: none.
        max_txt_len: text tokens read at most, ``[CLS]`` and ``[SEP]`` included.
    """

    connector: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "qformer"})
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    embed_dim: PositiveInt = 256


class Features(dict[str, Tensor]):
    """Tensors by name, as items and, as LAVIS has them, as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there are no features '{name}', but {', '.join(self)}") from None


@registry.register_model("blip2")
class Blip2Stage1(VisionModel):
    """A frozen vision encoder and a Q-Former with its text branch. A second stage (``blip2_opt``) starts from
    its checkpoints.

    Args:
        vision: pixels [B, 3, H, W] -> visual tokens [B, N, C_vision].
        connector: the Q-Former, without a projection to a language model.
        tokenizer: texts -> ids.
        num_positions: tokens of a text at most.
        embed_dim: channels of the features that are contrasted.
        prompt: the text before every caption.
        freeze_vision: whether the vision encoder is not trained.
    """

    DEFAULT_MODEL_TYPE = "shapes"
    MODEL_TYPES: ClassVar[dict[str, str]] = {
        name: f"configs/models/blip2/{name}.yaml" for name in ("shapes", "pretrain", "minilm_l6")
    }
    CONFIG = Stage1Config
    LACKS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("predict_answers", "rank_answers"),
            f"BLIP-2's first stage answers no questions. {SECOND_STAGE}",
        ),
        "generate_tokens": f"BLIP-2's first stage does not learn from its own captions. {SECOND_STAGE}",
        "soft_prompts": f"BLIP-2's first stage has no soft prompts. {SECOND_STAGE}",
        **dict.fromkeys(
            ("chat", "answer_turns"), f"BLIP-2's first stage holds no conversations. {SECOND_STAGE}"
        ),
    }

    connector: QFormer

    def __init__(
        self,
        vision: VisionEncoder,
        connector: QFormer,
        tokenizer: QFormerTokenizer,
        num_positions: int,
        embed_dim: int = 256,
        prompt: str = "",
        freeze_vision: bool = True,
    ) -> None:
        super().__init__(vision, freeze_vision)
        width = connector.sizes.hidden_size
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.connector = connector
        self.text = QFormerText(connector, len(tokenizer), num_positions)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        self.freeze_parts()

    @classmethod
    def from_parts_config(cls, cfg: Stage1Config, device: torch.device) -> Blip2Stage1:
        """Builds the parts a config names.

        Raises:
            ConfigError: a connector other than a Q-Former, settings for videos, texts longer than the
                positions.
        """
        connector_args = dict(cfg.connector)
        connector_class = registry.get_connector_class(connector_args.pop("name", "qformer"))
        if not issubclass(connector_class, QFormer):
            raise ConfigError(
                f"model.connector.name is '{cfg.connector['name']}', and BLIP-2's first stage trains a "
                "qformer. Other connectors need no first stage: take an architecture such as evlgen_opt."
            )
        if cfg.vision.temporal:
            raise ConfigError("model.vision.temporal: BLIP-2's first stage is of images. Leave it out.")
        if cfg.vision.tiles:
            raise ConfigError("model.vision.tiles: BLIP-2's first stage reads no tiles. Leave it out.")
        if cfg.vision.norm_eps is None:
            raise ConfigError("model.vision.norm_eps: BLIP-2's first stage has the norm. Leave it out.")
        tokenizer = QFormerTokenizer(cfg.text.tokenizer, cfg.max_txt_len)
        vision = build_vision_encoder(cfg.vision, device)
        connector = connector_class.build(ConnectorInputs.behind(vision), **connector_args)
        num_positions = cfg.text.max_position_embeddings or connector.sizes.max_position_embeddings
        _check_learned(cfg.max_txt_len, num_positions)
        model = cls(vision, connector, tokenizer, num_positions, cfg.embed_dim, cfg.prompt, cfg.vision.freeze)
        model.set_norm(cfg.vision.norm_eps)
        logger.info(
            "BLIP-2's first stage: %.1f million weights trained, %.1f million frozen",
            sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
            sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6,
        )
        return model

    @classmethod
    def _hub_parts(cls, cfg: Stage1Config) -> dict[str, str]:
        parts = {"tokenizer": cfg.text.tokenizer}
        if (start := cfg.connector.get("init")) and start != cfg.text.tokenizer:
            parts["connector start"] = start
        return parts

    @classmethod
    def text_lengths(cls, cfg: Stage1Config) -> TextLengths | None:
        name = cfg.text.tokenizer
        return None if missing_model(name) else TextLengths(QFormerTokenizer(name, cfg.max_txt_len))

    @classmethod
    def check_room(
        cls, cfg: Stage1Config, prompt: str | None, num_new: int, learns: bool, num_frames: int = 1
    ) -> None:
        start, tokenizer_name = cfg.connector.get("init"), with_settings(cfg.text.tokenizer)
        start = start and with_settings(start)
        if tokenizer_name is None or (start is None and cfg.connector.get("init")):
            return
        known = cfg.text.max_position_embeddings or bert_sizes(start, num_layers=1).max_position_embeddings
        _check_learned(cfg.max_txt_len, known)
        if num_new:
            tokenizer = QFormerTokenizer(tokenizer_name, cfg.max_txt_len)
            _check_written(tokenizer.to_write_after(prompt or "").shape[1] + num_new, known)

    # ---- training ----

    def forward(self, samples: Batch) -> dict[str, Tensor]:
        """The three losses of a batch and their sum. In training, images and texts of other processes are
        negatives too.

        Args:
            samples: ``image`` [B, 3, H, W] (or ``visual_tokens`` [B, N, C_vision] that `encode` gave
                earlier), ``text_input`` list[str]; optionally ``image_id``, by which several pairs of one
                image are known.

        Returns:
            ``loss``, ``loss_itc``, ``loss_itm``, ``loss_lm``: scalars, float32. In training their means over
            processes, weighed by samples, are the losses of all samples in one batch.

        Raises:
            DataError: an image has several texts, or none.
        """
        if any(count != 1 for count in samples.get("num_texts", ())):
            raise DataError(
                "an image has several texts, and BLIP-2's first stage compares each image with one: train on "
                "one caption at a time (captions_together: false)."
            )
        tokens = self.image_tokens(samples)
        ids = self.tokenizer(texts_to_learn(samples))  # [B, L], on the CPU
        visual = self.connector.keys_values(self._normed(tokens))
        queries, past = self.connector.read(visual, len(tokens))
        everyone = GlobalBatch(len(tokens), tokens.device, alone=not self.training)
        # texts are of different lengths, and losses of processes weigh by their samples. The other two losses
        # are means over samples: negatives are wanting for all samples of all processes or for none
        written = int((ids[:, 1:] != self.tokenizer.pad).sum())
        loss_lm = self._writing_loss(ids, past) * everyone.weight(written, tokens.device)
        ids = ids.to(tokens.device, non_blocking=True)
        loss_itc, image_to_text, text_to_image, positive = self._contrast(
            queries, ids, self._image_keys(samples, everyone), everyone
        )
        loss_itm = self._matching_loss(
            tokens,
            visual,
            ids,
            hard_negatives(text_to_image, positive),
            hard_negatives(image_to_text, positive),
            everyone,
        )
        return {
            "loss": loss_itc + loss_itm + loss_lm,
            "loss_itc": loss_itc,
            "loss_itm": loss_itm,
            "loss_lm": loss_lm,
        }

    def _contrast(
        self, queries: Tensor, ids: Tensor, keys: Tensor, everyone: GlobalBatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The contrastive loss; similarities / temperature of one's own images with everyone's texts and of
        one's own texts with everyone's images, and which of either are of the same image; all [B, K]."""
        if self.training:
            with torch.no_grad():
                self.temp.clamp_(*TEMPERATURES)
        image_features = self._features(self.vision_proj(queries))  # [B, M, E]
        text_features = self._text_features(ids)  # [B, E]
        positive = positives(keys, everyone.gather(keys), everyone.offset)
        with without_autocast(ids.device):
            image_to_text = similarities(image_features, everyone.gather(text_features)) / self.temp
            text_to_image = similarities(everyone.gather(image_features), text_features).T / self.temp
            losses = [
                contrastive_loss(sims, positive, LABEL_SMOOTHING) for sims in (image_to_text, text_to_image)
            ]
        return (losses[0] + losses[1]) / 2, image_to_text, text_to_image, positive

    def _matching_loss(
        self,
        tokens: Tensor,
        visual: list[Tensor | None],
        ids: Tensor,
        negative_images: tuple[Tensor, Tensor],
        negative_texts: tuple[Tensor, Tensor],
        everyone: GlobalBatch,
    ) -> Tensor:
        """Telling right pairs from those with a similar image, and from those with a similar text.

        Args:
            tokens: of the encoder, [B, N, C_vision].
            visual: what the Q-Former reads of them.
            negative_images, negative_texts: of `hard_negatives`, one for each text and image.
        """
        wide = F.pad(ids, (0, self.tokenizer.max_txt_len - ids.shape[1]), value=self.tokenizer.pad)
        length = ids.shape[1] if everyone.is_alone else wide.shape[1]
        other_ids = everyone.gather(wide)[negative_texts[0]]
        other_visual = self._visual_of(negative_images[0], tokens, visual, everyone)
        logits = self._matching_logits(
            torch.cat([wide, wide, other_ids])[:, :length],
            [
                None if own is None or other is None else torch.cat([own, other, own])
                for own, other in zip(visual, other_visual, strict=True)
            ],
        )
        right = torch.ones_like(negative_images[0])
        wrong = [torch.where(found, 0, UNKNOWN) for _, found in (negative_images, negative_texts)]
        return F.cross_entropy(logits, torch.cat([right, *wrong]), ignore_index=UNKNOWN)

    def _visual_of(
        self, chosen: Tensor, tokens: Tensor, visual: list[Tensor | None], everyone: GlobalBatch
    ) -> list[Tensor | None]:
        """What the Q-Former reads of chosen images of everyone's, [B]."""
        if everyone.is_alone:
            return [None if own is None else own[chosen] for own in visual]
        # the encoder's own tokens travel: where it is frozen they need no gradient and have half the bytes
        return self.connector.keys_values(self._normed(everyone.gather(tokens)[chosen]))

    def _writing_loss(self, ids: Tensor, past: list[Tensor]) -> Tensor:
        """The mean next-token loss of the texts behind the queries; padding does not count.

        Args:
            ids: [B, L], on the CPU.
            past: keys and values of the queries.
        """
        # where a label is was found on the CPU: indexing with it on a GPU then waits for nothing
        rows, columns = (ids[:, 1:] != self.tokenizer.pad).nonzero(as_tuple=True)
        targets = ids[rows, columns + 1]
        ids = torch.cat([torch.full_like(ids[:, :1], self.tokenizer.begin), ids[:, 1:-1]], dim=1)
        ids, rows, columns, targets = (
            index.to(self.device, non_blocking=True) for index in (ids, rows, columns, targets)
        )
        hidden, _ = write(self.connector, self.text, ids, past)
        logits = self.text.logits(hidden[rows, columns])
        return F.cross_entropy(logits.float(), targets, label_smoothing=LABEL_SMOOTHING)

    # ---- use ----

    @torch.no_grad()
    def generate(
        self,
        samples: Batch,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        use_nucleus_sampling: bool = False,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        """Captions by the Q-Former's own head.

        Args:
            samples: ``image`` [B, 3, H, W]; optionally ``prompt``, the same for all images.
            num_beams, max_length, ...: as in `evlgen.models.vlm.VLM.generate`.

        Returns:
            B x num_captions texts, those of one image in a row, without the prompt.

        Raises:
            ConfigError: options out of range; more tokens than there are positions; several prompts.
        """
        options = Decoding(
            num_beams,
            max_length,
            min_length,
            top_p,
            use_nucleus_sampling,
            repetition_penalty,
            length_penalty,
            num_captions,
            temperature,
        )
        samples = with_pixels(self, samples)
        start = self.tokenizer.to_write_after(self._prompt(samples)).to(self.device)
        _check_written(start.shape[1] + max_length, self.text.positions.num_embeddings)
        tokens = self.image_tokens(samples)
        _, past = self.connector.read(self.connector.keys_values(self._normed(tokens)), len(tokens))
        start = start.expand(len(tokens), -1)
        ends = self.tokenizer.end, self.tokenizer.pad
        return self.tokenizer.decode(generate(self.connector, self.text, past, start, options, *ends))

    @torch.no_grad()
    def extract_features(
        self, samples: Batch, mode: Literal["image", "text", "multimodal"] = "multimodal"
    ) -> Features:
        """Features under LAVIS's names, as items and as attributes.

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` list[str]; of one mode only its own.

        Returns:
            ``image``: ``image_embeds`` [B, M, C] and ``image_embeds_proj`` [B, M, embed_dim], of length 1;
            ``text``: ``text_embeds`` [B, L, C] and ``text_embeds_proj`` [B, L, embed_dim];
            ``multimodal``: ``multimodal_embeds`` [B, M, C].
        """
        if mode == "text":
            hidden = self._read_text(self._ids(samples))
            return Features(text_embeds=hidden, text_embeds_proj=self._features(self.text_proj(hidden)))
        if mode not in ("image", "multimodal"):
            raise ConfigError(f"mode '{mode}' of features is none of image, text, multimodal.")
        visual = self._visual(samples)
        if mode == "image":
            queries, _ = self.connector.read(visual, _batch(visual))
            projected = self._features(self.vision_proj(queries))
            return Features(image_embeds=queries, image_embeds_proj=projected)
        ids = self._ids(samples)
        both = encode_multimodal(self.connector, self.text, ids, self._is_text(ids), visual)
        return Features(multimodal_embeds=both)

    @staticmethod
    def similarities(image_features: Tensor, text_features: Tensor) -> Tensor:
        """The cosine of each text with the query of each image that is nearest to it.

        Args:
            image_features: ``image_embeds_proj`` of B images, [B, M, embed_dim].
            text_features: the first token's of ``text_embeds_proj`` of K texts, [K, embed_dim].

        Returns:
            [B, K], float32.
        """
        with without_autocast(text_features.device):
            return similarities(image_features.float(), text_features.float())

    @torch.no_grad()
    def match(self, samples: Batch, head: Literal["itm", "itc"] = "itm") -> Tensor:
        """How well each image and its text fit.

        Args:
            samples: ``image`` [B, 3, H, W], or [1, 3, H, W] for all texts; ``text_input`` list[str].
            head: ``itm``: logits of *does not fit* and *fits*, [B, 2]; ``itc``: the cosine of their features,
                [B, 1].
        """
        if head not in ("itm", "itc"):
            raise ConfigError(f"head '{head}' for matching is none of itm, itc.")
        visual, ids = self._visual(samples), self._ids(samples)
        if head == "itm":
            visual = [None if seen is None else seen.expand(len(ids), -1, -1) for seen in visual]
            return self._matching_logits(ids, visual)
        queries, _ = self.connector.read(visual, _batch(visual))
        image, text = self._features(self.vision_proj(queries)), self._text_features(ids)
        return (image @ text[:, :, None]).amax(1)  # [B, M, E] by [B, E, 1]

    # ---- parts ----

    def _check_image(self, image: Tensor) -> None:
        super()._check_image(image)
        if image.ndim == 5:
            raise ConfigError("BLIP-2's first stage is a model of images, and a video was given to it.")

    def _prompt(self, samples: Batch) -> str:
        given = samples.get("prompt", self.prompt)
        prompts = {given} if isinstance(given, str) else set(given)
        if len(prompts) != 1:
            raise ConfigError("BLIP-2's first stage writes after one prompt for all images of a batch.")
        return prompts.pop()

    def _visual(self, samples: Batch) -> list[Tensor | None]:
        return self.connector.keys_values(self._normed(self.image_tokens(samples)))

    def _ids(self, samples: Batch) -> Tensor:
        texts = samples["text_input"]
        return self.tokenizer([texts] if isinstance(texts, str) else texts).to(self.device)

    def _is_text(self, ids: Tensor) -> Tensor:
        return ids != self.tokenizer.pad

    def _read_text(self, ids: Tensor) -> Tensor:
        return read_text(self.connector, self.text, ids, self._is_text(ids))

    def _text_features(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, embed_dim], of the first token, of length 1."""
        return self._features(self.text_proj(self._read_text(ids)[:, 0]))

    @staticmethod
    def _features(x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1)

    def _matching_logits(self, ids: Tensor, visual: list[Tensor | None]) -> Tensor:
        """[B, 2]: the mean of what the queries say."""
        queries = encode_multimodal(self.connector, self.text, ids, self._is_text(ids), visual)
        return self.itm_head(queries).float().mean(1)

    def _image_keys(self, samples: Batch, everyone: GlobalBatch) -> Tensor:
        if "image_id" in samples:
            return image_keys(samples["image_id"], self.device)
        own = len(samples["text_input"])
        return torch.arange(everyone.offset, everyone.offset + own, device=self.device)


@registry.register_model("blip2_image_text_matching")
class Blip2ITM(Blip2Stage1):
    """The first stage under LAVIS's name for matching: ``model(samples, match_head="itm")``."""

    def forward(  # type: ignore[override]  # as LAVIS has it
        self, samples: Batch, match_head: Literal["itm", "itc"] = "itm"
    ) -> Tensor:
        """How well each image and its text fit: `match`.

        Raises:
            ConfigError: in training, which is for ``blip2``; an unknown head.
        """
        if self.training:
            raise ConfigError(
                "blip2_image_text_matching says how well images and texts fit. Train model.arch: blip2, and "
                "load its checkpoint here; or call eval() first."
            )
        return self.match(samples, match_head)


def _batch(visual: list[Tensor | None]) -> int:
    return len(next(v for v in visual if v is not None))


def _check_learned(max_txt_len: int, known: int) -> None:
    if max_txt_len > known:
        raise ConfigError(
            f"model.max_txt_len is {max_txt_len}, and text has {known} positions. Lower it, or raise "
            "model.text.max_position_embeddings."
        )


def _check_written(positions: int, known: int) -> None:
    if positions > known:
        raise ConfigError(
            f"text takes {positions} positions, and BLIP-2's first stage has {known}. Lower max_length "
            "(run.max_len)."
        )

"""Any causal language model of transformers as reader of soft prompts.

A sequence is what the tokenizer itself puts before a text (``<bos>`` for LLaMA and Gemma), then the soft
prompts, then the prompt or input, then the text to learn, then the tokenizer's end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.model_config import SoftPromptMergingConfig
from evlgen.models.language.chat import ChatTemplate, read_template
from evlgen.models.language.generation import Decoding, decode, decode_stepwise
from evlgen.models.language.hugging_face import (
    HuggingFaceLanguageModel,
    Predictions,
    for_each_text,
    truncate_at_eos,
)
from evlgen.models.language.prefixes import can_read_trees
from evlgen.models.language.ranking import Reader, TreeReader
from evlgen.models.language.segments import (
    IGNORED,
    VISUAL,
    Layout,
    Part,
    Read,
    Row,
    Segment,
    SoftPrompts,
    Tokens,
    Visual,
    chosen,
    lay_out,
    num_soft_of,
)
from evlgen.models.language.soft_prompt_merging import SoftPromptMerging
from evlgen.models.language.text_trees import Forest, forest, packed, single_trees, text_trees
from evlgen.processors.turns import Turn


@registry.register_language_model("causal")
class CausalLanguageModel(HuggingFaceLanguageModel):
    """Any causal model of transformers. A subclass with conventions of its own defines `_to_learn`,
    `_to_continue`, `_to_answer` and `_find_ends`."""

    KIND = "causal"
    AUTO_CLASS = AutoModelForCausalLM
    START_FIRST = True  # whether the start token stands before a sample's first image, not behind it
    end_token_ids: list[int]
    _chat: ChatTemplate | None = None
    _talk: ChatTemplate | None = None
    _merging: SoftPromptMerging | None = None

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return is_causal(config)

    @property
    def turn_end_token_ids(self) -> list[int]:
        return self._conversations().end_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def _predictions_of(
        self, soft_prompts: SoftPrompts, samples: Sequence[Row], num_texts: list[int] | None = None
    ) -> Predictions:
        if num_texts is not None and not isinstance(soft_prompts, Tensor):
            pairs = zip(soft_prompts, num_texts, strict=True)
            soft_prompts, num_texts = [prompts for prompts, count in pairs for _ in range(count)], None
        trees = self._trees_of(soft_prompts, samples, num_texts)
        if trees is not None:
            return self._predictions_of_trees(soft_prompts, trees)
        if num_texts is not None:
            soft_prompts = for_each_text(cast(Tensor, soft_prompts), num_texts)
        # right padding needs no mask: what is causal does not see it
        embeds, layout = self._embed(soft_prompts, samples, padding_side="right")
        rows, columns = (layout.labels != IGNORED).nonzero(as_tuple=True)
        self._check_something_is_learned(len(rows))
        self._check_length(layout.ids.shape[1], "model.max_txt_len")
        # a token is predicted one position before it stands
        return self._predictions_at(rows, columns - 1, layout.labels[rows, columns], inputs_embeds=embeds)

    def _trees_of(
        self, soft_prompts: SoftPrompts, samples: Sequence[Row], num_texts: list[int] | None
    ) -> Forest | None:
        """Samples as trees; None where nothing is saved by it, or the model cannot read them."""
        if num_texts is not None:
            num_soft = cast(Tensor, soft_prompts).shape[1]
            trees = text_trees(cast(list[Tokens], samples), num_texts, num_soft)
        elif self.pack:
            trees = single_trees(samples, num_soft_of(soft_prompts))
        else:
            return None
        lengths = [len(tree.positions) for tree in trees]
        rows = packed(lengths, self.embed_dim)
        if num_texts is None and len(rows) == len(trees):
            return None
        return forest(trees, rows) if can_read_trees(self.model, max(lengths)) else None

    def _predictions_of_trees(self, soft_prompts: SoftPrompts, trees: Forest) -> Predictions:
        """As `_predictions_of`, where what the texts of an image share is read once, and rows have several
        samples."""
        self._check_something_is_learned(len(trees.targets))
        self._check_length(int(trees.positions.max()) + 1, "model.max_txt_len")
        embeds, layout = self._embed(chosen(soft_prompts, trees.images), trees.rows, padding_side="right")
        positions, visible = _widened(layout.ids.shape[1], trees.positions, trees.visible)
        return self._predictions_at(
            trees.places[0],
            trees.places[1],
            trees.targets,
            trees.texts,
            inputs_embeds=embeds,
            attention_mask=_additive(visible, embeds),
            position_ids=positions.to(embeds.device, non_blocking=True),
        )

    @torch.no_grad()
    def generate_tokens(self, soft_prompts: Tensor, prompts: list[str], **options) -> list[list[int]]:
        """Continues each prompt after its soft prompts, up to an end token or ``max_length`` new tokens.

        Args:
            soft_prompts: [B, M, C].
            prompts: B texts to continue; may be empty.
            options: fields of `Decoding`.

        Returns:
            the tokens of B x num_captions texts without the prompt, those of one image in a row; the last
            one is an end token unless ``max_length`` cut the text.
        """
        decoding = Decoding(**options)
        return self._continue(soft_prompts, self.to_read(prompts), decoding, self.end_token_ids)

    @torch.no_grad()
    def continue_rows(self, soft_prompts: SoftPrompts, rows: Sequence[Row], **options) -> list[list[int]]:
        return self._continue(soft_prompts, rows, Decoding(**options), self.turn_end_token_ids)

    @torch.no_grad()
    def stream_row(self, soft_prompts: SoftPrompts, row: Row, **options) -> Iterator[list[int]]:
        decoding = Decoding(**options)
        embeds, layout = self._embed(soft_prompts, [row], padding_side="left")
        self._check_length(embeds.shape[1] + decoding.max_length, "max_length (run.max_len)")
        ends = self.turn_end_token_ids
        tokens: list[int] = []
        for (token,) in decode_stepwise(self.model, embeds, layout.mask, decoding, ends, self.pad_token_id):
            tokens.append(token)
            yield tokens

    def _continue(
        self, soft_prompts: SoftPrompts, rows: Sequence[Row], options: Decoding, ends: list[int]
    ) -> list[list[int]]:
        # padding stands before everything: a model whose past is a state would carry on what it reads later
        embeds, layout = self._embed(soft_prompts, rows, padding_side="left")
        self._check_length(embeds.shape[1] + options.max_length, "max_length (run.max_len)")
        ids = decode(self.model, embeds, layout.mask, options, ends, self.pad_token_id)
        return [truncate_at_eos(row, ends) for row in ids.tolist()]

    def check_room(self, num_soft_prompts: int, prompt: str | None, num_new: int, learns: bool) -> None:
        if learns:
            learned = num_soft_prompts + self._most_in_training(prompt)
            self._check_length(learned, "model.max_txt_len (and max_output_txt_len)")
        if num_new:
            read = num_soft_prompts + self._most_read(prompt)
            self._check_length(read + num_new, "max_length (run.max_len)")

    def _most_in_training(self, prompt: str | None) -> int:
        """Tokens of a text that is learned, and of what is read before it, at most."""
        return self._most_read(prompt) + self.max_output_txt_len

    def to_learn(self, text_in: list[str], text_out: list[str] | None = None) -> list[Tokens]:
        if self._chat is not None:
            return [self._turns(*texts) for texts in self._split(text_in, text_out)]
        return self._to_learn(text_in, text_out)

    def to_read(self, prompts: list[str]) -> list[Tokens]:
        if self._chat is not None:
            return [Tokens(*self._question(prompt), []) for prompt in prompts]
        return [self._to_continue(prompt) for prompt in prompts]

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `generate_tokens`."""
        return [self._text(ids) for ids in tokens]

    def row_of_parts(self, parts: Sequence[Part]) -> list[Segment]:
        row: list[Segment] = []
        is_started, gap = False, ""
        for part in parts:
            if not is_started and (self.START_FIRST or not isinstance(part, Visual)):
                row.append(Segment(self._start))
                is_started = True
            if isinstance(part, Visual):
                row.append(VISUAL)
                gap = ""
            elif isinstance(part, Read):
                row.append(Segment(self._token_ids(part.text)))
                gap = self._gap_after(part.text)
            else:
                ids = self._to_answer([part.text], gap)[0] if part.end else self._token_ids(gap + part.text)
                row.append(Segment(ids, learned=True))
                gap = ""
        return row

    def row_of_turns(self, turns: Sequence[Turn], answers_next: bool = False) -> list[Segment]:
        return self._conversations().conversation(turns, answers_next)

    def _conversations(self) -> ChatTemplate:
        """The template of conversations: as ``chat_template`` says, else the tokenizer's, else
        ``question_answer``."""
        if self._talk is None:
            known = self._chat
            if known is None:
                own = None if self.tokenizer.chat_template else read_template("question_answer")
                known = ChatTemplate(self.tokenizer, self.name, self.end_token_ids, own)
            self._talk = known
        return self._talk

    def _to_learn(self, text_in: list[str], text_out: list[str] | None) -> list[Tokens]:
        """The tokens of a batch to learn from. Input and output are tokenised apart, so that a token belongs
        to one of them."""
        samples = []
        for read, learned in self._split(text_in, text_out):
            (ids,) = self._to_answer([learned], self._gap_after(read))
            samples.append(Tokens(self._start, self._last(self._token_ids(read), self.max_txt_len), ids))
        return samples

    def _gap_after(self, prompt: str) -> str:
        return self._gap if prompt and not prompt[-1].isspace() else ""

    def _answer_ids(self, texts: list[str], gap: str) -> list[list[int]]:
        if self._chat is not None:
            return [self._chat.answer(text, self.max_output_txt_len) for text in texts]
        return self._to_answer(texts, gap)

    def _to_answer(self, texts: list[str], gap: str) -> list[list[int]]:
        """The tokens of each text after a prompt and a gap, its end token the last."""
        return [
            [*ids[: self.max_output_txt_len - 1], self.end_token_ids[0]]
            for ids in self._plain_text.batch([gap + text for text in texts])
        ]

    def _reader(self, soft_prompts: Tensor, prompts: list[str], width: int, length: int) -> Reader:
        embeds, layout = self._embed(soft_prompts, self.to_read(prompts), padding_side="left")
        if not can_read_trees(self.model, embeds.shape[1] + length):
            return super()._reader(soft_prompts, prompts, width, length)
        self._check_length(embeds.shape[1] + length, "model.max_txt_len")
        return TreeReader(self.model, embeds, layout.mask, width, length)

    def _to_continue(self, prompt: str) -> Tokens:
        """The tokens of a prompt to continue."""
        return Tokens(self._start, self._last(self._token_ids(prompt), self.max_txt_len), [])

    def _find_ends(self) -> list[int]:
        """The tokens that end a text; the first of them ends what is learned."""
        ends = end_tokens(self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id)
        known = range(self.model.get_input_embeddings().weight.shape[0])
        ends = [token for token in ends if token in known]
        if not ends:
            raise ConfigError(
                f"the tokenizer of model.language.name '{self.name}' has no end token, where generation "
                "ends. Set `eos_token` in its tokenizer_config.json."
            )
        return ends

    def _prepare_model(self) -> None:
        self.end_token_ids = self._find_ends()
        self._start = self._plain_text.before
        alone = self._token_ids("a")
        # tokenizers that begin a text with a blank (sentencepiece) need none between input and output
        self._gap = " " if self.tokenizer.decode([*alone, *alone]).strip() == "aa" else ""

    def _read_chat_template(self, template: str | None) -> None:
        self._chat = ChatTemplate(self.tokenizer, self.name, self.end_token_ids, template)
        self.end_token_ids = self._chat.end_token_ids

    def _merge_soft_prompts(self, cfg: SoftPromptMergingConfig) -> None:
        self._merging = SoftPromptMerging(self.model, self.name, cfg)

    def _question(self, text: str) -> tuple[list[int], list[int]]:
        words = self._token_ids(text)
        if len(words) > self.max_txt_len:
            text = self.tokenizer.decode(self._last(words, self.max_txt_len)).strip()
        return self._conversations().question(text)

    def _turns(self, question: str, answer: str) -> Tokens:
        """A question and its answer in the chat template."""
        before, read = self._question(question)
        return Tokens(before, read, self._conversations().answer(answer, self.max_output_txt_len))

    def _embed(
        self, soft_prompts: SoftPrompts, rows: Sequence[Row], padding_side: str
    ) -> tuple[Tensor, Layout]:
        """The sequences of a batch: embeddings [B, L, C], and what stands where in them.

        Args:
            soft_prompts: of the images of all rows, in their order: [K, M, C], or K tensors [M, C].
        """
        width_of = self._training_width if padding_side == "right" else None
        layout = lay_out(rows, num_soft_of(soft_prompts), self.pad_token_id, padding_side, width_of)
        if self._merging is not None:
            self._merging.expect(layout, num_soft_of(soft_prompts))
        if isinstance(soft_prompts, Tensor):
            prompts = soft_prompts.flatten(0, 1)  # [P, C]
        else:
            prompts = torch.cat(list(soft_prompts))
        embeds = self._embed_words(layout.ids.to(prompts.device, non_blocking=True))
        row, column = layout.places.to(prompts.device, non_blocking=True)
        return embeds.index_put((row, column), prompts.to(embeds.dtype)), layout

    def _training_width(self, longest: int) -> int:
        """Positions of a batch to learn from whose longest sample has so many: a GPU plans attention for
        each length (0.1 s), so few lengths occur there."""
        multiple = _length_multiple(self.model.device)
        return max(longest, min(-(-longest // multiple) * multiple, self.max_positions or longest + multiple))

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.end_token_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def _length_multiple(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 1


def _widened(width: int, positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, L] and what each sees [B, L, L] with padding up to a width; padding sees itself."""
    missing = width - positions.shape[1]
    if not missing:
        return positions, visible
    itself = torch.eye(width, dtype=torch.bool)
    return F.pad(positions, (0, missing)), F.pad(visible, (0, missing, 0, missing)) | itself


def _additive(visible: Tensor, embeds: Tensor) -> Tensor:
    """What a position sees [B, L, L] as a mask that is added to scores, the same for all heads: [B, 1, L,
    L]."""
    hidden = torch.finfo(embeds.dtype).min
    mask = torch.zeros_like(visible, dtype=embeds.dtype).masked_fill_(~visible, hidden)
    return mask[:, None].to(embeds.device, non_blocking=True)


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a decoder that transformers knows."""
    kind = str(config.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or is_encoder_decoder(config):
        return False
    return kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(config.get("is_decoder"))


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of an encoder-decoder that transformers knows."""
    return str(config.get("model_type")) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and bool(
        config.get("is_encoder_decoder", True)
    )


def end_tokens(*tokens: int | list[int] | None) -> list[int]:
    """Several settings of end tokens, each one token, several or none, as one list without repetition."""
    flat = [t for setting in tokens for t in (setting if isinstance(setting, list) else [setting])]
    return list(dict.fromkeys(t for t in flat if t is not None))

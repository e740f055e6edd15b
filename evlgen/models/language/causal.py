"""Any causal language model of transformers as reader of soft prompts.

A sequence is what the tokenizer itself puts before a text (``<bos>`` for LLaMA and Gemma), then the soft
prompts, then the prompt or input, then the text to learn, then the tokenizer's end token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.models.language.chat import ChatTemplate
from evlgen.models.language.generation import Decoding, can_read_trees, decode
from evlgen.models.language.hugging_face import (
    IGNORED,
    HuggingFaceLanguageModel,
    Predictions,
    Tokens,
    for_each_text,
    up_to_end,
)
from evlgen.models.language.ranking import Reader, TreeReader
from evlgen.models.language.text_trees import TextTrees, text_trees


@registry.register_language_model("causal")
class CausalLanguageModel(HuggingFaceLanguageModel):
    """Any causal model of transformers. A subclass with conventions of its own defines `_to_learn`,
    `_to_continue`, `_to_answer` and `_find_ends`."""

    KIND = "causal"
    AUTO_CLASS = AutoModelForCausalLM
    _chat: ChatTemplate | None = None

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return is_causal(config)

    def _predictions_of(
        self, soft_prompts: Tensor, samples: list[Tokens], num_texts: list[int] | None = None
    ) -> Predictions:
        num_soft = soft_prompts.shape[1]
        if num_texts is not None:
            trees = text_trees(samples, num_texts, num_soft)
            if can_read_trees(self.model, trees.visible.shape[-1]):
                return self._predictions_of_trees(soft_prompts, trees)
            soft_prompts = for_each_text(soft_prompts, num_texts)
        labels = [
            [IGNORED] * (len(s.before) + num_soft + len(s.read)) + s.learned for s in samples
        ]  # B lists
        labels = pad_sequence([torch.tensor(row) for row in labels], True, IGNORED)  # [B, L]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        self._check_something_is_learned(len(rows))
        self._check_length(labels.shape[1], "model.max_txt_len")
        # right padding needs no mask: what is causal does not see it
        embeds, _ = self._embed(soft_prompts, samples, padding_side="right")
        # a token is predicted one position before it stands
        return self._predictions_at(rows, columns - 1, labels[rows, columns], inputs_embeds=embeds)

    def _predictions_of_trees(self, soft_prompts: Tensor, trees: TextTrees) -> Predictions:
        """As `_predictions_of`, where what the texts of an image share is read once."""
        self._check_something_is_learned(len(trees.targets))
        self._check_length(int(trees.positions.max()) + 1, "model.max_txt_len")
        embeds, _ = self._embed(soft_prompts, trees.rows, padding_side="right")
        hidden = torch.finfo(embeds.dtype).min
        mask = torch.zeros_like(trees.visible, dtype=embeds.dtype).masked_fill_(~trees.visible, hidden)
        return self._predictions_at(
            trees.places[0],
            trees.places[1],
            trees.targets,
            trees.texts,
            inputs_embeds=embeds,
            attention_mask=mask[:, None].to(embeds.device),  # the same for all heads
            position_ids=trees.positions.to(embeds.device),
        )

    @torch.no_grad()
    def generate_tokens(self, soft_prompts: Tensor, prompts: list[str], **options) -> list[list[int]]:
        """Continues each prompt after its soft prompts, up to an end token or ``max_length`` new tokens.

        Args:
            soft_prompts: [B, M, C].
            prompts: B texts to continue; may be empty.
            options: fields of `Decoding`.

        Returns:
            the tokens of B x num_captions texts without the prompt, those of one picture in a row; the last
            one is an end token unless ``max_length`` cut the text.
        """
        options = Decoding(**options)
        samples = self.to_read(prompts)
        # padding stands before everything: a model whose past is a state would carry on what it reads later
        embeds, mask = self._embed(soft_prompts, samples, padding_side="left")
        self._check_length(embeds.shape[1] + options.max_length, "max_length (run.max_len)")
        ids = decode(self.model, embeds, mask, options, self.end_token_ids, self.pad_token_id)
        return [up_to_end(row, self.end_token_ids) for row in ids.tolist()]

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
        embeds, mask = self._embed(soft_prompts, self.to_read(prompts), padding_side="left")
        if not can_read_trees(self.model, embeds.shape[1] + length):
            return super()._reader(soft_prompts, prompts, width, length)
        self._check_length(embeds.shape[1] + length, "model.max_txt_len")
        return TreeReader(self.model, embeds, mask, width, length)

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

    def _read_chat_template(self) -> None:
        self._chat = ChatTemplate(self.tokenizer, self.name, self.end_token_ids)
        self.end_token_ids = self._chat.end_token_ids

    def _question(self, text: str) -> tuple[list[int], list[int]]:
        words = self._token_ids(text)
        if len(words) > self.max_txt_len:
            text = self.tokenizer.decode(self._last(words, self.max_txt_len)).strip()
        return self._chat.question(text)

    def _turns(self, question: str, answer: str) -> Tokens:
        """A question and its answer in the chat template."""
        before, read = self._question(question)
        return Tokens(before, read, self._chat.answer(answer, self.max_output_txt_len))

    def _embed(self, soft_prompts: Tensor, samples: list[Tokens], padding_side: str) -> tuple[Tensor, Tensor]:
        """The sequences of a batch: embeddings [B, L, C], and a mask [B, L] on the CPU, 0 for padding."""
        batch, num_soft, width = soft_prompts.shape
        places = [self.pad_token_id] * num_soft
        ids = [torch.tensor([*s.before, *places, *s.read, *s.learned]) for s in samples]
        starts = torch.tensor([len(s.before) for s in samples])
        mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, padding_side)
        ids = pad_sequence(ids, True, self.pad_token_id, padding_side)  # [B, L]
        if padding_side == "left":
            starts = starts + (mask == 0).sum(1)
        device = soft_prompts.device
        embeds = self._embed_words(ids.to(device))
        rows = torch.arange(batch)[:, None].expand(-1, num_soft).to(device)  # [B, M]
        columns = (starts[:, None] + torch.arange(num_soft)).to(device)  # [B, M]
        return embeds.index_put((rows, columns), soft_prompts.to(embeds.dtype)), mask

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.end_token_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


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

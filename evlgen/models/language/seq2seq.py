"""Encoder-decoders, such as FlanT5 in BLIP-2, as readers of soft prompts.

Li et al., *BLIP-2*, 2023, section 3.3. The encoder reads the soft prompts and the prompt or input, the
decoder learns the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from evlgen.common.registry import registry
from evlgen.models.language.causal import end_tokens, is_encoder_decoder
from evlgen.models.language.generation import Decoding, decode_by_transformers
from evlgen.models.language.hugging_face import (
    HuggingFaceLanguageModel,
    Predictions,
    for_each_text,
    truncate_at_eos,
)
from evlgen.models.language.loading import num_positions
from evlgen.models.language.ranking import Reader, likelihoods_of
from evlgen.models.language.segments import IGNORED, Row, SoftPrompts, Tokens


@registry.register_language_model("seq2seq")
class Seq2SeqLanguageModel(HuggingFaceLanguageModel):
    """Any encoder-decoder of transformers. Input and output have the special tokens its tokenizer gives
    them; with an empty prompt the encoder reads those alone."""

    KIND = "seq2seq"
    AUTO_CLASS = AutoModelForSeq2SeqLM
    end_token_ids: list[int]

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return is_encoder_decoder(config)

    def _predictions_of(
        self, soft_prompts: SoftPrompts, samples: Sequence[Row], num_texts: list[int] | None = None
    ) -> Predictions:
        of_images, texts = cast(Tensor, soft_prompts), cast(list[Tokens], samples)  # as `to_learn` gives them
        embeds, mask = self._encoder_inputs(for_each_text(of_images, num_texts), texts)
        labels = pad_sequence([torch.tensor(text.learned) for text in texts], True, IGNORED)  # [B, T]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        self._check_something_is_learned(len(rows))
        self._check_length(labels.shape[1], "model.max_output_txt_len")
        # the decoder reads the text one position later, after its start token
        read = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return self._predictions_at(
            rows,
            columns,
            labels[rows, columns],
            inputs_embeds=embeds,
            attention_mask=mask.to(embeds.device, non_blocking=True),
            decoder_input_ids=read.to(embeds.device, non_blocking=True),
        )

    @torch.no_grad()
    def generate_tokens(self, soft_prompts: Tensor, prompts: list[str], **options) -> list[list[int]]:
        """What the decoder writes, up to its end token or ``max_length`` new tokens. See
        `CausalLanguageModel.generate_tokens`."""
        decoding = Decoding(**options)
        embeds, mask = self._encoder_inputs(soft_prompts, self.to_read(prompts))
        self._check_length(1 + decoding.max_length, "max_length (run.max_len)")
        ends = self.end_token_ids
        ids = decode_by_transformers(
            self.model, embeds, mask.to(embeds.device), decoding, ends, self.pad_token_id
        )
        return [truncate_at_eos(row, ends) for row in ids[:, 1:].tolist()]  # without the start token

    def check_room(self, num_soft_prompts: int, prompt: str | None, num_new: int, learns: bool) -> None:
        read = self.max_txt_len if prompt is None else self._most_read(prompt)
        self._check_length(num_soft_prompts + read, "model.max_txt_len")
        if learns:
            self._check_length(self.max_output_txt_len, "model.max_output_txt_len")
        if num_new:
            self._check_length(1 + num_new, "max_length (run.max_len)")

    def to_learn(self, text_in: list[str], text_out: list[str] | None = None) -> list[Tokens]:
        """What the decoder learns is ``text_out``; or, without one, ``text_in``, while the encoder reads the
        prompt."""
        texts = self._split(text_in, text_out)
        read = self._read([read for read, _ in texts], self.max_txt_len)
        pairs = zip(read, self._answer_ids([text for _, text in texts], ""), strict=True)
        return [Tokens([], ids, learned) for ids, learned in pairs]

    def to_read(self, prompts: list[str]) -> list[Tokens]:
        """As published, a prompt to continue is not cut, unless the model has a limit of positions."""
        limit = self.max_txt_len if num_positions(self.model.config) else None
        return [Tokens([], ids, []) for ids in self._read(prompts, limit)]

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `generate_tokens`."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _answer_ids(self, texts: list[str], gap: str) -> list[list[int]]:
        room = max(0, self.max_output_txt_len - len(self._start) - len(self._end))
        return [[*self._start, *ids[:room], *self._end] for ids in self._plain_text.batch(texts)]

    def _reader(self, soft_prompts: Tensor, prompts: list[str], width: int, length: int) -> Reader:
        self._check_length(length, "model.max_output_txt_len")
        return _DecoderReader(self.model, *self._encoder_inputs(soft_prompts, self.to_read(prompts)))

    def _encoder_inputs(self, soft_prompts: Tensor, samples: list[Tokens]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, M + L, C] and their mask [B, M + L], 0 for padding, on the CPU."""
        rows = [torch.tensor(s.read) for s in samples]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0)
        mask = torch.cat([mask.new_ones(soft_prompts.shape[:2]), mask], dim=1)
        self._check_length(mask.shape[1], "model.max_txt_len")
        ids = pad_sequence(rows, True, self.pad_token_id)  # [B, L]
        embeds = self._embed_words(ids.to(soft_prompts.device, non_blocking=True))
        return torch.cat([soft_prompts.to(embeds.dtype), embeds], dim=1), mask

    def _embed_words(self, ids: Tensor) -> Tensor:
        # Marian and others scale in the encoder what they look up, and nothing that is given to them
        scale = getattr(self.model.get_encoder(), "embed_scale", 1.0)
        return super()._embed_words(ids) * scale

    def _read(self, texts: list[str], max_tokens: int | None) -> list[list[int]]:
        """What the encoder reads of texts; of one that is too long the last tokens, since what a prompt says
        after a question is near its end."""
        rows = self._plain_text.batch(texts)
        if max_tokens is not None:
            room = max(0, max_tokens - len(self._start) - len(self._end))
            rows = [self._last(ids, room) for ids in rows]
        return [[*self._start, *ids, *self._end] for ids in rows]

    def _prepare_model(self) -> None:
        self._start, self._end = self._plain_text.before, self._plain_text.after
        self.end_token_ids = end_tokens(
            self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id
        )
        # lavis/models/blip2_models/blip2_t5.py sets it (dense_act_fn); FlanT5's own is an approximation of it
        for module in self.model.modules():
            if type(module).__name__ == "T5DenseGatedActDense":  # importing T5 takes a fifth of a second
                module.act = nn.GELU()


class _DecoderReader:
    """The decoder reads texts after what the encoder has read once. See `ranking.Reader`.

    Args:
        embeds: [B, L, C], what the encoder reads.
        mask: [B, L], 0 where it is padding.
    """

    def __init__(self, model: PreTrainedModel, embeds: Tensor, mask: Tensor) -> None:
        self.model = model
        self.mask = mask.to(embeds.device)
        self.states = model.get_encoder()(inputs_embeds=embeds, attention_mask=self.mask).last_hidden_state
        self.logits = self._decode(torch.zeros(len(embeds), 1, dtype=torch.long), 1)[:, 0]

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        texts = tokens.flatten(0, 1)  # [B * R, T]
        found = likelihoods_of(self._decode(texts, tokens.shape[1]), texts).view(tokens.shape)
        behind = torch.arange(tokens.shape[2]) >= lengths[:, :, None]
        return found.masked_fill(behind, 0.0).sum(2)

    def _decode(self, texts: Tensor, count: int) -> Tensor:
        """Texts [B * count, T], those of one prompt in a row -> logits of their tokens."""
        labels = texts.to(self.states.device)
        return self.model(
            encoder_outputs=BaseModelOutput(self.states.repeat_interleave(count, 0)),
            attention_mask=self.mask.repeat_interleave(count, 0),
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels=labels),
            use_cache=False,
        ).logits

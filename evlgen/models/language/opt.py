"""OPT as reader of soft prompts, with the text conventions of BLIP-2 and EVL_Gen.

Zhang et al., *OPT: Open Pre-trained Transformer Language Models*, 2022. A text is tokenised with its leading
``</s>``, right padded and truncated; it ends in a newline, and so does generation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.common.hub import local_model_folder
from evlgen.common.registry import registry
from evlgen.common.weights import reading, weights_only
from evlgen.models.language.base import LanguageModel
from evlgen.models.language.generation import Decoding, decode

IGNORED = -100  # label of positions that are not learned


@contextlib.contextmanager
def _named_errors(name: str, folder: Path) -> Iterator[None]:
    """Whatever transformers says of a damaged or incomplete folder, as a `CheckpointError`."""
    try:
        with reading(folder), weights_only():
            yield
    except CheckpointError as error:
        raise CheckpointError(f"model.language.name '{name}': {error}") from error


@registry.register_language_model("opt")
class OPTLanguageModel(LanguageModel):
    """Any OPT by hub id or folder.

    Args:
        name: hub id or local folder, weights as safetensors or PyTorch files; read memory-mapped.
        dtype: type of the weights.
        prompt: the text before every caption; its tokens are not learned.
        max_txt_len: text tokens read at most.
        attention: transformers' name of the attention it computes with (`ops.language_attention`).

    Raises:
        CheckpointError: the model is nowhere, or is no OPT.
        ConfigError: its tokenizer cannot serve (no pad token, no newline token).
    """

    END = "\n"

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        prompt: str = "",
        max_txt_len: int = 32,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        try:
            folder = local_model_folder(name)
        except CheckpointError as error:
            raise CheckpointError(f"model.language.name {error}") from error
        with _named_errors(name, folder):
            kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != "opt":
            raise CheckpointError(f"model.language.name '{name}' is a {kind} model, not an OPT.")
        with _named_errors(name, folder):
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, clean_up_tokenization_spaces=False, trust_remote_code=False
            )
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        with _named_errors(name, folder):
            self._check_tokenizer(name)
            self.model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
            raise CheckpointError(
                f"model.language.name '{name}': {folder} lacks {len(missing)} of its weights, such as "
                f"{missing[0]}. Get it again."
            )
        self.embed_dim = self.model.get_input_embeddings().embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @torch.no_grad()
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings' entries."""
        return self.model.get_input_embeddings().weight.float().square().mean().sqrt().item()

    def loss(
        self, soft_prompts: Tensor, text_in: list[str], text_out: list[str] | None = None
    ) -> tuple[Tensor, int]:
        """The mean next-token loss of ``text_in + "\\n"``; the prompt's tokens and padding do not count.

        With ``text_out`` what is read is ``text_in``, and ``text_out + "\\n"`` is learned.

        Returns:
            The loss (scalar, float32) and the number of tokens it is the mean of.
        """
        texts = (
            text_in
            if text_out is None
            else [f"{a} {b}".strip() for a, b in zip(text_in, text_out, strict=True)]
        )
        tokens = self._tokenize([text + self.END for text in texts], padding_side="right")
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, IGNORED)  # [B, L]
        if text_out is None:
            unlearned = [self.prompt if text.startswith(self.prompt) else "" for text in texts]
        else:
            unlearned = text_in
        for row, text in enumerate(unlearned):
            if text:
                labels[row, : len(self.tokenizer(text).input_ids)] = IGNORED
        # where a label is was found on the CPU: indexing with it on a GPU then waits for nothing
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        if not len(rows):
            raise ConfigError(
                f"no text token is left to learn: the prompt fills max_txt_len ({self.max_txt_len}). Raise "
                "model.max_txt_len."
            )
        device = soft_prompts.device
        targets = labels[rows, columns].to(device)
        hidden = self._hidden_states(soft_prompts, tokens.input_ids.to(device))  # [B, M + L, C]
        # the token at text position i is predicted one position earlier
        predictors = hidden[rows.to(device), (columns + soft_prompts.shape[1] - 1).to(device)]
        logits = self.model.get_output_embeddings()(predictors)  # [learned tokens, vocabulary]
        return F.cross_entropy(logits.float(), targets), len(rows)

    @torch.no_grad()
    def generate(self, soft_prompts: Tensor, prompts: list[str], **options) -> list[str]:
        """Continues each prompt after its soft prompts, up to a newline or ``max_length`` new tokens.

        Args:
            soft_prompts: [B, M, C].
            prompts: B texts to continue; may be empty.
            options: fields of `Decoding`.

        Returns:
            B x num_captions texts without the prompt, those of one picture in a row.
        """
        options = Decoding(**options)
        tokens = self._tokenize(prompts, padding_side="left")
        embeds = self.model.get_input_embeddings()(tokens.input_ids.to(soft_prompts.device))
        embeds = torch.cat([soft_prompts.to(embeds.dtype), embeds], dim=1)  # [B, M + L, C]
        self._check_length(embeds.shape[1] + options.max_length, "max_length (run.max_len)")
        mask = torch.cat(
            [tokens.attention_mask.new_ones(soft_prompts.shape[:2]), tokens.attention_mask], dim=1
        )
        ids = decode(self.model, embeds, mask, options, self.end_token_id, self.tokenizer.pad_token_id)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _tokenize(self, texts: list[str], padding_side: str):
        return self.tokenizer(
            texts,
            return_tensors="pt",
            padding="longest",
            truncation=True,
            max_length=self.max_txt_len,
            padding_side=padding_side,
        )

    def _hidden_states(self, soft_prompts: Tensor, input_ids: Tensor) -> Tensor:
        """[B, M, C] and [B, L] -> the last hidden states [B, M + L, C]. Right padding needs no mask: what is
        causal does not see it."""
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = torch.cat([soft_prompts.to(embeds.dtype), embeds], dim=1)
        self._check_length(embeds.shape[1], "model.max_txt_len")
        return self.model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def _check_length(self, positions: int, key: str) -> None:
        known = self.model.config.max_position_embeddings
        if positions > known:
            raise ConfigError(
                f"soft prompts and text take {positions} positions, and the language model has {known}. "
                f"Lower {key}, "
                "or raise model.connector.r for fewer soft prompts."
            )

    def _check_tokenizer(self, name: str) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the tokenizer of model.language.name '{name}' has no pad token, which batches of texts "
                "need. "
                "Set `pad_token` in its tokenizer_config.json (OPT's is <pad>)."
            )
        ids = self.tokenizer(self.END, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ConfigError(
                f"the tokenizer of model.language.name '{name}' has no token of its own for the newline, "
                "where generation "
                "ends; OPT's has. Take an OPT's tokenizer."
            )
        self.end_token_id = ids[0]

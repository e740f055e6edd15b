"""What all language models of transformers share as readers of soft prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from evlgen.common.errors import CheckpointError, ConfigError, DataError
from evlgen.config.model_config import LoraConfig, SoftPromptMergingConfig
from evlgen.models.language.adapters import adapter_modules, add_adapters
from evlgen.models.language.base import LanguageModel
from evlgen.models.language.chat import read_template
from evlgen.models.language.in_parts import BatchPart, parts_of, total_loss
from evlgen.models.language.loading import (
    find_model,
    model_without_weights,
    named_errors,
    num_positions,
    read_config,
    read_model,
    read_tokenizer,
)
from evlgen.models.language.plain_text import PlainText
from evlgen.models.language.quantization import quantization_options
from evlgen.models.language.ranking import Reader, RepeatingReader, log_likelihoods
from evlgen.models.language.segments import (
    Part,
    Row,
    Segment,
    SoftPrompts,
    Tokens,
    by_image,
    num_soft_of,
)
from evlgen.models.language.token_loss import token_losses
from evlgen.models.ops import Linear
from evlgen.processors.turns import Turn

_EMBEDDED_AT_ONCE = 8192


class Predictions(NamedTuple):
    """The n tokens of a batch that are learned, those of one sample in a row.

    Attributes:
        scores: [n, vocabulary]: logits; or [n, C], what ``head`` makes logits of.
        head: the output layer where it is frozen and the last that a model does; else None.
        targets: [n], the tokens.
        rows: [n], the text each belongs to.
    """

    scores: Tensor
    head: nn.Linear | None
    targets: Tensor
    rows: Tensor

    def logits(self) -> Tensor:
        """[n, vocabulary], float32."""
        return (self.scores if self.head is None else self.head(self.scores)).float()

    def losses(self) -> Tensor:
        """[n], float32: the negated log-likelihood of each token."""
        if self.head is None:
            return F.cross_entropy(self.logits(), self.targets, reduction="none")
        return token_losses(self.scores, self.head.weight, self.head.bias, self.targets)


class HuggingFaceLanguageModel(LanguageModel):
    """A model of transformers by hub id or folder.

    A subclass says which models it reads, and how texts become token ids and predictions of them.

    Args:
        name: hub id or local folder, weights as safetensors or PyTorch files, read memory-mapped; or a
            ``.gguf`` file, whose weights are dequantised.
        dtype: type of the weights.
        prompt: the text before every caption; its tokens are not learned.
        max_txt_len: text tokens read at most.
        max_output_txt_len: tokens learned at most where input and output are read apart; None: as
            ``max_txt_len``.
        attention: transformers' name of the attention it computes with (`ops.language_attention`).
        quantization: ``none``, ``8bit`` or ``4bit``.
        lora: adapters that are trained.
        chat_template: put prompts into the tokenizer's chat template, or into the named one; see
            `evlgen.models.language.chat.read_template`.
        pack, tome: see `LanguageConfig`.
        device: where it will run; it matters to ``quantization``, and ``meta`` makes a model without weights,
            that only knows how texts become tokens.

    Raises:
        CheckpointError: the model is nowhere, damaged, or of a kind this class does not read.
        ConfigError: its tokenizer cannot serve; an option needs what is not there.
    """

    KIND: ClassVar[str]  # its registered name
    AUTO_CLASS: ClassVar[Any]
    positions_at_once = 1024  # enough for a GPU to be busy with
    _ends_with_head: bool | None = None  # whether its output layer's are the logits; None: not known yet

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        prompt: str = "",
        max_txt_len: int = 32,
        max_output_txt_len: int | None = None,
        attention: str = "sdpa",
        quantization: str = "none",
        lora: LoraConfig | None = None,
        chat_template: bool | str = False,
        device: str | torch.device = "cpu",
        pack: bool = False,
        tome: SoftPromptMergingConfig | None = None,
    ) -> None:
        super().__init__()
        self.pack = pack
        self.name = name
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        self.max_output_txt_len = max_txt_len if max_output_txt_len is None else max_output_txt_len
        path = find_model(name)
        config = read_config(name, path)
        self._check_kind(config)
        options = quantization_options(quantization, dtype, torch.device(device))
        self.tokenizer = read_tokenizer(name, path)
        with named_errors(name, path):
            self._prepare_tokenizer()
            self._plain_text = PlainText(self.tokenizer)
        if torch.device(device).type == "meta":
            self.model = model_without_weights(self.AUTO_CLASS, config)
        else:
            self.model = read_model(self.AUTO_CLASS, name, path, config, dtype, attention, **options)
        with named_errors(name, path):
            self._prepare_model()
        self.pad_token_id = self._pad_token()
        if chat_template:
            self._read_chat_template(read_template(chat_template) if isinstance(chat_template, str) else None)
        if tome is not None:
            self._merge_soft_prompts(tome)
        if lora is not None:
            add_adapters(self.model, lora)
        self.embed_dim = self.model.get_input_embeddings().embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def max_positions(self) -> int | None:
        return num_positions(self.model.config)

    def trained_modules(self) -> list[nn.Module]:
        """The adapters, if there are any."""
        return adapter_modules(self.model)

    def goes_in_parts(self) -> bool:
        """Whether the gradients of a part of a batch may be computed before those of the rest: not of weights
        that are many or spread over processes, and not in float16, where a loss is scaled first."""
        small = {id(weight) for module in self.trained_modules() for weight in module.parameters()}
        return self.dtype != torch.float16 and not any(
            (weight.requires_grad and id(weight) not in small) or hasattr(weight, "full_tensor")
            for weight in self.parameters()
        )

    def loss(
        self,
        soft_prompts: Tensor,
        text_in: list[str],
        text_out: list[str] | None = None,
        num_texts: list[int] | None = None,
    ) -> tuple[Tensor, int]:
        """The mean next-token loss of the texts after the soft prompts; see `LanguageModel.loss`. A prompt's
        tokens do not count, nor do ``text_in``'s where there is a ``text_out``, nor padding."""
        return self._mean_loss(soft_prompts, self.to_learn(text_in, text_out), num_texts)

    def rows_loss(self, soft_prompts: SoftPrompts, rows: Sequence[Row]) -> tuple[Tensor, int]:
        """As `loss`, of samples that are segments already."""
        return self._mean_loss(soft_prompts, rows)

    def rows_losses(self, soft_prompts: SoftPrompts, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """As `sample_losses`, of samples that are segments already."""
        return _by_sample(self._predictions_of(soft_prompts, rows), len(rows))

    def weighted_loss(
        self,
        soft_prompts: SoftPrompts,
        rows: Sequence[Row],
        weights: Tensor,
        num_texts: list[int] | None = None,
    ) -> Tensor:
        """See `LanguageModel.weighted_loss`."""
        return self._total_loss(soft_prompts, rows, num_texts, weights)[0]

    def sample_losses(
        self,
        soft_prompts: Tensor,
        text_in: list[str],
        text_out: list[str] | None = None,
        num_texts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Each text's loss by itself; see `LanguageModel.sample_losses`."""
        found = self._predictions_of(soft_prompts, self.to_learn(text_in, text_out), num_texts)
        return _by_sample(found, len(text_in))

    def token_losses(
        self,
        soft_prompts: Tensor,
        prompts: list[str],
        texts: list[list[int]],
        num_texts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The losses of texts as `generate_tokens` wrote them; see `LanguageModel.token_losses`."""
        found = self._predictions_of_tokens(soft_prompts, prompts, texts, num_texts)
        return _by_sample(found, len(texts))

    @torch.no_grad()
    def log_likelihoods(
        self,
        soft_prompts: Tensor,
        prompts: list[str],
        texts: Sequence[Sequence[str]],
        num_candidates: int | None = None,
    ) -> list[Tensor]:
        """How likely each of several texts is after each prompt; see `LanguageModel.log_likelihoods`."""
        known: dict[tuple[int, str], list[list[int]]] = {}  # a list that all prompts share is tokenised once
        ids = []
        for prompt, of_one in zip(prompts, texts, strict=True):
            gap = self._gap_after(prompt)
            if (id(of_one), gap) not in known:
                known[id(of_one), gap] = self._answer_ids(list(of_one), gap)
            ids.append(known[id(of_one), gap])
        return log_likelihoods(
            lambda width, length: self._reader(soft_prompts, prompts, width, length), ids, num_candidates
        )

    def to_learn(self, text_in: list[str], text_out: list[str] | None = None) -> list[Tokens]:
        """The tokens of texts to learn from, within the limits; see `loss`."""
        raise NotImplementedError

    def tokens_to_learn(self, prompts: list[str], texts: list[list[int]]) -> list[Tokens]:
        """As `to_learn`, of texts that are tokens already; see `token_losses`."""
        pairs = zip(self.to_read(prompts), texts, strict=True)
        return [sample._replace(learned=ids) for sample, ids in pairs]

    def to_read(self, prompts: list[str]) -> list[Tokens]:
        """The tokens of prompts to continue, within the limits."""
        raise NotImplementedError

    def check_whole(self, text: str) -> None:
        count = len(self._plain_text(text))
        if count > self.max_txt_len:
            limit = self.max_txt_len
            raise DataError(f"the text takes {count} tokens, and the model reads {limit}: shorten it.")

    def num_read(self, prompt: str) -> int:
        (tokens,) = self.to_read([prompt])
        return len(tokens.before) + len(tokens.read)

    def without_answer(self, text_in: list[str], text_out: list[str]) -> list[int]:
        lengths = map(len, self._plain_text.batch(text_in))  # a control token that is spelled is several
        start = len(self._plain_text.before)
        places = [place for place, length in enumerate(lengths) if start + length >= self.max_txt_len]
        if not places:
            return []
        found = self.to_learn(*([texts[place] for place in places] for texts in (text_in, text_out)))
        return [place for place, tokens in zip(places, found, strict=True) if not tokens.learned]

    @torch.no_grad()
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings' entries, as the model adds soft prompts to them: Gemma's
        embedding layer, for one, multiplies what it looks up."""
        weight = self.model.get_input_embeddings().weight
        squares = 0.0
        for ids in torch.arange(len(weight), device=weight.device).split(_EMBEDDED_AT_ONCE):
            squares += self._embed_words(ids).float().square().sum().item()
        return (squares / weight.numel()) ** 0.5

    def _embed_words(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> what the model takes as ``inputs_embeds`` in their place, [..., C]."""
        return self.model.get_input_embeddings()(ids)

    def _prepare_tokenizer(self) -> None:
        """Checks or completes the tokenizer, before the weights are read."""

    def _prepare_model(self) -> None:
        """Fits the model to the tokenizer."""

    def row_of_parts(self, parts: Sequence[Part]) -> list[Segment]:
        raise ConfigError(self._no_rows())

    def row_of_turns(self, turns: Sequence[Turn], answers_next: bool = False) -> list[Segment]:
        raise ConfigError(self._no_rows())

    def _no_rows(self) -> str:
        return (
            f"a language model of kind '{self.KIND}' reads one image and one text: conversations, and "
            "samples of segments, need a decoder. Set model.language.name to one."
        )

    def _read_chat_template(self, template: str | None) -> None:
        raise ConfigError(
            f"model.language.chat_template: a language model of kind '{self.KIND}' has no place for one. Set "
            "it to false."
        )

    def _merge_soft_prompts(self, cfg: SoftPromptMergingConfig) -> None:
        raise ConfigError(
            f"model.language.tome: a language model of kind '{self.KIND}' merges no soft prompts. Take it "
            "out, or name a decoder in model.language.name."
        )

    def _pad_token(self) -> int:
        """The token that fills batches. Whatever it is, nothing sees or learns it."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.unk_token_id, 0)
        return next(token for token in known if token is not None)

    def _token_ids(self, text: str) -> list[int]:
        """The tokens of a text alone, without those a tokenizer puts around it."""
        return self._plain_text(text)

    @staticmethod
    def _last(ids: list[int], count: int) -> list[int]:
        """The last ``count`` tokens: what is nearest to the text to write counts most."""
        return ids[max(0, len(ids) - count) :]

    def _caption(self, text: str) -> tuple[str, str]:
        """A text to learn -> the prompt, which generation begins with, and what is learned after it."""
        if self.prompt and self._begins_with_prompt(text):
            return self.prompt, text[len(self.prompt) :].lstrip()
        return self.prompt, text

    def _begins_with_prompt(self, text: str) -> bool:
        """Whether a text begins with the prompt's words: "a photo often" does not begin with "a photo of"."""
        goes_on = self.prompt[-1:].isalnum() and text[len(self.prompt) :][:1].isalnum()
        return text.startswith(self.prompt) and not goes_on

    def _split(self, text_in: list[str], text_out: list[str] | None) -> list[tuple[str, str]]:
        """What is read and what is learned of each sample."""
        if text_out is None:
            return [self._caption(text) for text in text_in]
        return list(zip(text_in, text_out, strict=True))

    def _mean_loss(
        self, soft_prompts: SoftPrompts, rows: Sequence[Row], num_texts: list[int] | None = None
    ) -> tuple[Tensor, int]:
        """The mean loss of the tokens, and how many those are."""
        total, count = self._total_loss(soft_prompts, rows, num_texts)
        return total / count, count

    def _total_loss(
        self,
        soft_prompts: SoftPrompts,
        rows: Sequence[Row],
        num_texts: list[int] | None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """The sum of the losses of the tokens, each times its text's weight, and how many those are."""
        num_soft = num_soft_of(soft_prompts)
        whole = not (torch.is_grad_enabled() and self.goes_in_parts())
        parts = [] if whole else parts_of(rows, num_soft, num_texts, self.positions_at_once)
        if len(parts) < 2:
            losses = _weighed(self._predictions_of(soft_prompts, rows, num_texts), weights)
            return losses.sum(), len(losses)

        def losses_of(prompts: Tensor, part: BatchPart) -> Tensor:
            of_images = by_image(prompts, num_soft[part.images])
            found = self._predictions_of(of_images, rows[part.samples], part.num_texts)
            return _weighed(found, None if weights is None else weights[part.samples])

        is_one = isinstance(soft_prompts, Tensor)
        prompts = cast(Tensor, soft_prompts).flatten(0, 1) if is_one else torch.cat([*soft_prompts])  # [P, C]
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        return total_loss(losses_of, prompts, parts, trained)

    def _predictions_of(
        self, soft_prompts: SoftPrompts, samples: Sequence[Row], num_texts: list[int] | None = None
    ) -> Predictions:
        """What the model expects where a token is learned; ``num_texts`` as in `loss`."""
        raise NotImplementedError

    def _predictions_of_tokens(
        self,
        soft_prompts: Tensor,
        prompts: list[str],
        texts: list[list[int]],
        num_texts: list[int] | None = None,
    ) -> Predictions:
        """As `_predictions_of`, of tokens after prompts."""
        return self._predictions_of(soft_prompts, self.tokens_to_learn(prompts, texts), num_texts)

    def _reader(self, soft_prompts: Tensor, prompts: list[str], width: int, length: int) -> Reader:
        """What reads texts after the prompts: ``width`` texts of a prompt side by side at most, and
        ``length`` tokens of one."""

        def losses(rows: list[int], texts: list[list[int]]) -> Tensor:
            return self.token_losses(soft_prompts[rows], [prompts[row] for row in rows], texts)[0]

        any_token = [[self.pad_token_id]] * len(prompts)  # what is predicted first does not depend on it
        return RepeatingReader(self._predictions_of_tokens(soft_prompts, prompts, any_token).logits(), losses)

    def _gap_after(self, prompt: str) -> str:
        """What stands between a prompt and the text after it."""
        return ""

    def _answer_ids(self, texts: list[str], gap: str) -> list[list[int]]:
        """The tokens of each text after a prompt and a gap, its end token the last."""
        raise NotImplementedError

    def _predictions_at(
        self, rows: Tensor, columns: Tensor, targets: Tensor, texts: Tensor | None = None, **inputs
    ) -> Predictions:
        """The predictions of ``targets`` [n] at the positions (rows [n], columns [n]) of the batch, those of
        one text in a row of it unless ``texts`` [n] names the text of each; indices on the CPU, so that
        nothing waits for a GPU. Logits are computed there alone."""
        texts = rows if texts is None else texts
        device = inputs["inputs_embeds"].device
        rows, columns, targets, texts = (
            index.to(device, non_blocking=True) for index in (rows, columns, targets, texts)
        )
        return Predictions(*self._scores_at(rows, columns, inputs), targets, texts)

    def _scores_at(
        self, rows: Tensor, columns: Tensor, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, nn.Linear | None]:
        """What the model's own forward does before and after its output layer (a scale, a cap) stays in
        force: the layer is given the hidden states [1, n, C] of those positions only. Where the layer is
        frozen and nothing comes after it, the hidden states are returned with it."""
        head = self.model.get_output_embeddings()
        if head is None or self.model._compiled_call_impl is not None:
            # a compiled forward would go on with the hooks it was compiled with
            return self.model(**inputs, use_cache=False).logits[rows, columns], None
        hidden, given = rows, rows  # until the hooks run
        is_enough = self._ends_with_head and _is_plain(head)  # the hidden states, without logits

        def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal hidden
            hidden = args[0][rows, columns]
            return (hidden[:1][None] if is_enough else hidden[None], *args[1:])

        def see(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal given
            given = output

        handles = [head.register_forward_pre_hook(pick), head.register_forward_hook(see)]
        try:
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        if self._ends_with_head is None:
            self._ends_with_head = logits is given
            is_enough = self._ends_with_head and _is_plain(head)
        return (hidden, head) if is_enough else (logits[0], None)

    def _check_something_is_learned(self, count: int) -> None:
        if not count:
            raise ConfigError(
                f"no text token is left to learn: the prompt fills max_txt_len ({self.max_txt_len}). Raise "
                "model.max_txt_len."
            )

    def _most_read(self, prompt: str | None) -> int:
        """Tokens that are read before a text, at most; see `check_room`."""
        tokens = self.to_read([prompt or ""])[0]
        questions = self.max_txt_len if prompt is None else 0
        return len(tokens.before) + len(tokens.read) + questions

    def _check_length(self, positions: int, key: str) -> None:
        """Raises `ConfigError` for more positions than the model has, where it has a limit."""
        known = num_positions(self.model.config)
        if known and positions > known:
            raise ConfigError(
                f"soft prompts and text take {positions} positions, and the language model has {known}. "
                f"Lower {key}, or take fewer soft prompts (model.connector)."
            )

    def _check_kind(self, config: PretrainedConfig) -> None:
        if not self.reads(config.to_dict()):
            raise CheckpointError(
                f"model.language.name '{self.name}' is a {config.model_type} model, which "
                f"model.language.kind '{self.KIND}' does not read. Leave model.language.kind out, or set "
                "another: causal for any decoder, seq2seq for any encoder-decoder."
            )


def truncate_at_eos(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens of a text up to and with its end token, without what fills the row behind it."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]


def for_each_text(soft_prompts: Tensor, num_texts: list[int] | None) -> Tensor:
    """Soft prompts [B, M, C] -> those of each text, [N, M, C]."""
    if num_texts is None:
        return soft_prompts
    images = torch.arange(len(num_texts)).repeat_interleave(torch.tensor(num_texts))  # on the CPU: no waiting
    return soft_prompts.index_select(0, images.to(soft_prompts.device, non_blocking=True))


def _by_sample(predictions: Predictions, count: int) -> tuple[Tensor, Tensor]:
    """The sum of the losses of each text's tokens, [count], and how many those are, [count]."""
    losses, rows = predictions.losses(), predictions.rows  # [n]
    num_tokens = rows.new_zeros(count).index_add(0, rows, torch.ones_like(rows))  # bincount waits for a GPU
    return losses.new_zeros(count).index_add(0, rows, losses), num_tokens


def _weighed(predictions: Predictions, weights: Tensor | None) -> Tensor:
    """The losses of all tokens, [n], each times its text's weight, [N]."""
    losses = predictions.losses()
    return losses if weights is None else losses * weights[predictions.rows]


def _is_plain(head: nn.Module) -> bool:
    """Whether an output layer is a frozen linear layer and no more: without adapters, whole in this process,
    with weights that are not quantised."""
    return (
        type(head) in (nn.Linear, Linear)
        and type(head.weight.data) is Tensor
        and head.weight.is_floating_point()
        and not any(p.requires_grad for p in head.parameters())
    )

"""The Q-Former's text branch, of BLIP-2's first stage: words through the self-attention that the queries use,
with feed-forward blocks and a language-model head of their own.

Li et al., 2023 (arXiv 2301.12597), section 3.2: which of queries and text see which is what the three
objectives differ in.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.models.connectors.qformer import INITIALISER_STD, FeedForward, QFormer
from evlgen.models.connectors.qformer_weights import load_bert
from evlgen.models.language.generation import Decoding, search
from evlgen.models.language.plain_text import PlainText
from evlgen.models.language.prefixes import branch_rows
from evlgen.models.ops import linear
from evlgen.weights.hub import local_model_folder
from evlgen.weights.weights import reading, weights_only


class TextTokens(NamedTuple):
    """The tokens of a text: what is read before it, and what is learned."""

    read: list[int]
    learned: list[int]


class QFormerTokenizer:
    """Texts as BERT reads them, ``[CLS] words [SEP]``, by a tokenizer of any kind.

    Where a tokenizer has no ``[CLS]`` and ``[SEP]`` they are added to it, and always, as published,
    ``[DEC]``, which stands in the place of ``[CLS]`` where text is written.

    Args:
        name: hub id or folder.
        max_txt_len: tokens of a text at most, the two around it included.

    Attributes:
        start, begin, end, pad: ids of ``[CLS]``, ``[DEC]``, ``[SEP]`` and padding.

    Raises:
        CheckpointError: there is no such tokenizer, or a damaged one.
        ConfigError: it has no pad token; ``max_txt_len`` leaves no room for a word.
    """

    def __init__(self, name: str, max_txt_len: int) -> None:
        if max_txt_len < 3:
            raise ConfigError(f"model.max_txt_len is {max_txt_len}; a word with [CLS] and [SEP] takes 3.")
        self.max_txt_len = max_txt_len
        with _named_errors(name):
            folder = local_model_folder(name)
            with reading(folder), weights_only():
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, clean_up_tokenization_spaces=False, trust_remote_code=False
                )
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"model.text.tokenizer '{name}' has no pad token, which batches of texts need. Set "
                "`pad_token` in its tokenizer_config.json."
            )
        added = {"bos_token": "[DEC]"}
        if tokenizer.cls_token_id is None:
            added["cls_token"] = "[CLS]"
        if tokenizer.sep_token_id is None:
            added["sep_token"] = "[SEP]"
        tokenizer.add_special_tokens(added)
        self.tokenizer, self._plain_text = tokenizer, PlainText(tokenizer)
        self.start, self.begin = tokenizer.cls_token_id, tokenizer.bos_token_id
        self.end, self.pad = tokenizer.sep_token_id, tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, texts: list[str]) -> Tensor:
        """B texts -> ids [B, L] on the CPU, padded on the right to the longest."""
        rows = [sample.learned for sample in self.to_learn(texts)]
        longest = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])

    def to_learn(self, text_in: list[str], text_out: list[str] | None = None) -> list[TextTokens]:
        """The tokens of texts to learn from, within the limit; ``text_out`` is not read."""
        return [TextTokens([], [self.start, *words, self.end]) for words in self._words(text_in)]

    def to_read(self, prompts: list[str]) -> list[TextTokens]:
        """The tokens of texts that are not learned, within the limit."""
        return [TextTokens(sample.learned, []) for sample in self.to_learn(prompts)]

    def to_write_after(self, prompt: str) -> Tensor:
        """``[DEC]`` and the words of a prompt, [1, L]."""
        return torch.tensor([[self.begin, *self._words([prompt])[0]]])

    def decode(self, ids: Tensor) -> list[str]:
        """[B, L] -> B texts."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _words(self, texts: list[str]) -> list[list[int]]:
        return [ids[: self.max_txt_len - 2] for ids in self._plain_text.batch(texts)]


@contextlib.contextmanager
def _named_errors(name: str):
    try:
        yield
    except CheckpointError as error:
        prefix = "" if str(error).startswith(f"'{name}'") else f"'{name}': "
        raise CheckpointError(f"model.text.tokenizer {prefix}{error}") from error


class QFormerText(nn.Module):
    """What text has of its own in a Q-Former: words, positions, feed-forward blocks, a head that writes.

    Args:
        queries: the Q-Former whose self-attention it uses, and whose BERT it starts from.
        num_words: words of the tokenizer.
        num_positions: tokens of a text at most.
    """

    def __init__(self, queries: QFormer, num_words: int, num_positions: int) -> None:
        super().__init__()
        sizes = queries.sizes
        width = sizes.hidden_size
        self.words = nn.Embedding(num_words, width)
        self.positions = nn.Embedding(num_positions, width)
        self.layers = nn.ModuleList(FeedForward(sizes) for _ in queries.layers)
        self.head_dense = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(num_words))
        self._initialise(queries)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[B, L] and positions broadcast to it -> [B, L, C], before `QFormer.embed`."""
        return self.words(ids) + self.positions(positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> scores of the next word [..., vocabulary], by the word embeddings."""
        hidden = self.head_norm(F.gelu(self.head_dense(hidden)))
        return linear(hidden, self.words.weight, self.head_bias)

    @torch.no_grad()
    def _initialise(self, queries: QFormer) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIALISER_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if queries.init is not None:
            load_bert(self, queries.init, "text")


def read_text(queries: QFormer, text: QFormerText, ids: Tensor, mask: Tensor) -> Tensor:
    """Text by itself, every word seeing every other.

    Args:
        ids: [B, L].
        mask: [B, L], false where ``ids`` is padding.

    Returns:
        [B, L, C].
    """
    x = queries.embed(text.embed(ids, _positions(ids)))
    for layer, own in zip(queries.layers, text.layers, strict=True):
        x, _ = layer.attend(x, mask=mask[:, None, None])
        x = own(x)
    return x


def encode_multimodal(
    queries: QFormer, text: QFormerText, ids: Tensor, mask: Tensor, visual: list[Tensor | None]
) -> Tensor:
    """Queries and text together, all seeing all; the queries see the image too.

    Args:
        ids, mask: as in `read_text`.
        visual: of `QFormer.keys_values`.

    Returns:
        what the queries hold in the end, [B, M, C].
    """
    batch, num_queries = len(ids), queries.num_query_token
    words = text.embed(ids, _positions(ids))
    x = torch.cat([queries.query_tokens.expand(batch, -1, -1).to(words.dtype), words], dim=1)
    x = queries.embed(x)  # [B, M + L, C]
    mask = F.pad(mask, (num_queries, 0), value=True)[:, None, None]
    for layer, own, seen in zip(queries.layers, text.layers, visual, strict=True):
        x, _ = layer.attend(x, mask=mask)
        read = layer.feed_forward(layer.cross_attend(x[:, :num_queries], seen))
        if layer is queries.layers[-1]:  # nobody reads what the text holds in the end
            return read
        x = torch.cat([read, own(x[:, num_queries:])], dim=1)
    return x


def write(
    queries: QFormer,
    text: QFormerText,
    ids: Tensor,
    past: list[Tensor],
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Text behind queries that do not see it.

    Args:
        ids: [B, L].
        past: each layer's keys and values of what stands before, [B, P, 2 C]: of `QFormer.read`, and of text
            that was written already.
        positions: of the text, broadcast to [B, L]; None: it begins here.
        mask: true where a token sees another, broadcast to [B, heads, L, P + L]; None: all of the past, and
            of the text what stands before.

    Returns:
        [B, L, C]; each layer's keys and values of all that was seen, [B, P + L, 2 C].
    """
    length = ids.shape[1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = F.pad(mask, (past[0].shape[1], 0), value=True)
    x = queries.embed(text.embed(ids, _positions(ids) if positions is None else positions))
    seen = []
    for layer, own, before in zip(queries.layers, text.layers, past, strict=True):
        x, kv = layer.attend(x, before, mask)
        seen.append(kv)
        x = own(x)
    return x, seen


def generate(
    queries: QFormer,
    text: QFormerText,
    past: list[Tensor],
    start: Tensor,
    options: Decoding,
    end_token: int,
    pad_token: int,
) -> Tensor:
    """Texts behind the queries.

    Args:
        past: of `QFormer.read`.
        start: [B, P], what each text begins with.

    Returns:
        ids of the new tokens, [B x num_captions, T].
    """
    ends = torch.tensor([end_token], device=start.device)
    return search(lambda branches: _Prefix(queries, text, past, start, branches), options, ends, pad_token)


class _Prefix:
    """What has been read, with R branches behind it in one sequence: a `prefixes.Prefix`."""

    def __init__(
        self, queries: QFormer, text: QFormerText, past: list[Tensor], start: Tensor, branches: int
    ) -> None:
        self.queries, self.text = queries, text
        hidden, self.past = write(queries, text, start, past)
        self.logits = text.logits(hidden[:, -1:])  # [B, 1, vocabulary]
        batch, length = start.shape
        self.next_position = start.new_full((batch, branches), length)
        device = start.device
        self.visible = torch.ones(
            batch, branches, self.past[0].shape[1], dtype=torch.bool, device=device
        )  # [B, R, tokens read]
        self.own = torch.eye(branches, dtype=torch.bool, device=device).expand(batch, -1, -1)

    def read(self, tokens: Tensor, branches: Tensor | None = None) -> Tensor:
        """One more token in each branch, [B, R] -> scores of the next one [B, R, vocabulary]; ``branches``
        [B, R] names the branch that each continues, None its own."""
        if branches is not None:
            self.visible = branch_rows(self.visible, branches)
        self.visible = torch.cat([self.visible, self.own], dim=2)
        hidden, self.past = write(
            self.queries, self.text, tokens, self.past, self.next_position, self.visible[:, None]
        )
        self.next_position = self.next_position + 1
        return self.text.logits(hidden)


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)

"""Trains the bundled language model of the Shapes world: a small OPT on documents, text alone, with a
tokenizer of its own.

A document may open with a bag of words (see ``evlgen.datasets.shapes.documents``). A bag position that holds
several words is read as the sum of their word embeddings with a little noise. The loss is on the text after
the bag.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from recipe import logger, muon_and_adamw, report, start, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from evlgen.datasets.shapes.documents import Document, corpus_lines, document
from evlgen.datasets.shapes.world import scene

PAD, END = 1, 2  # OPT's ids; END also begins every text
POSITIONS = 256
CONFIG = dict(
    hidden_size=128,
    word_embed_proj_dim=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    ffn_dim=384,
    max_position_embeddings=POSITIONS,
    dropout=0.0,
    attention_dropout=0.0,
    layerdrop=0.0,
    pad_token_id=PAD,
    bos_token_id=END,
    eos_token_id=END,
)
_NOISE = 0.15  # of the standard deviation of a word embedding, on bag positions
_EMBEDDING_STD = 0.1
_SHIFTED = 0.2  # share of documents that start elsewhere than at position 0
_POOL = 8  # batches of documents sorted by length together, so that padding is short


def train_tokenizer(scenes: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as OPT's: any text can be encoded, every Shapes word is one token, ``</s>`` leads.

    The vocabulary is the same every time; tokenizers breaks ties of frequency by chance, so a few ids may be
    swapped.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = (line for i in range(scenes) for line in corpus_lines(scene("train", i, seed)))
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=768,
            min_frequency=5,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=POSITIONS,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves it under the class name that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


class DocumentStream:
    """Batches of fresh documents, each batch of similar lengths."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> None:
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        self.rng, self.next, self.ready = random.Random(f"documents/{seed}"), 0, []
        self.word_ids: dict[str, int] = {}

    def batch(self) -> list[tuple[list[list[int]], list[int]]]:
        """For every document its bag (word ids per position) and its text's ids, ``</s>`` first."""
        if not self.ready:
            pool = [self._encode(self._document()) for _ in range(_POOL * self.batch_size)]
            pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
            self.ready = [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
            self.rng.shuffle(self.ready)
        return self.ready.pop()

    def _document(self) -> Document:
        self.next += 1
        return document(scene("train", self.next, self.seed), self.rng)

    def _encode(self, item: Document) -> tuple[list[list[int]], list[int]]:
        bag = [[self._word_id(word) for word in words] for words in item.bag]
        return bag, self.tokenizer(item.text)["input_ids"]

    def _word_id(self, word: str) -> int:
        if word not in self.word_ids:
            self.word_ids[word] = self.tokenizer(" " + word, add_special_tokens=False)["input_ids"][0]
        return self.word_ids[word]


def document_loss(
    model: OPTForCausalLM, pairs: list[tuple[list[list[int]], list[int]]], shift: bool = True
) -> Tensor:
    """Next-token loss on the texts. ``shift`` starts documents at random positions, so that all positions are
    trained."""
    embed = model.get_input_embeddings()
    lengths = [len(bag) + len(ids) for bag, ids in pairs]
    longest = max(lengths)
    ids = torch.full((len(pairs), longest, 5), PAD)
    labels = torch.full((len(pairs), longest), -100)
    for i, (bag, text) in enumerate(pairs):
        for j, words in enumerate(bag):
            ids[i, j, : len(words)] = torch.tensor(words)
        ids[i, len(bag) : lengths[i], 0] = torch.tensor(text)
        labels[i, len(bag) : lengths[i]] = torch.tensor(text)
        labels[i, len(bag)] = -100
    vectors = (embed(ids) * (ids != PAD)[..., None]).sum(2)  # [B, L, C]
    in_bag = torch.arange(longest)[None] < torch.tensor([len(bag) for bag, _ in pairs])[:, None]
    noise = torch.randn_like(vectors) * embed.weight.detach().std() * _NOISE
    vectors = vectors + noise * in_bag[..., None]
    positions = torch.arange(longest).expand(len(pairs), -1)
    if shift:
        room = torch.randint(0, POSITIONS - longest, (len(pairs), 1))
        positions = positions + room * (torch.rand(len(pairs), 1) < _SHIFTED)
    hidden = model.model.decoder(
        inputs_embeds=vectors, position_ids=positions, use_cache=False
    ).last_hidden_state
    target = labels[:, 1:]
    wanted = target != -100
    return cross_entropy(model.lm_head(hidden[:, :-1][wanted]), target[wanted])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets language/")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's, for the matrices of the layers")
    parser.add_argument("--adamw-lr", type=float, default=3e-3, help="for everything else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokenizer-scenes", type=int, default=4000)
    args = parser.parse_args(argv)
    start(args.seed, args.threads)
    tokenizer = train_tokenizer(args.tokenizer_scenes, args.seed)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **CONFIG))
    # as drawn by transformers they are so small that words used alike (left, right) stay the same vector for
    # long
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING_STD)
    stream = DocumentStream(tokenizer, args.batch_size, args.seed)
    logger.info("%d tokens in the vocabulary", len(tokenizer))
    minutes = train(
        muon_and_adamw(model, args.lr, args.adamw_lr),
        lambda step: document_loss(model, stream.batch()),
        args.steps,
    )
    model.eval()
    with torch.no_grad():
        loss = sum(document_loss(model, stream.batch(), shift=False).item() for _ in range(8)) / 8
    folder = args.output / "language"
    save_tokenizer(tokenizer, folder)
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    report(
        args.output / "language.json",
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        adamw_lr=args.adamw_lr,
        seed=args.seed,
        minutes=round(minutes, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(tokenizer),
        loss_on_fresh_documents=round(loss, 4),
    )


if __name__ == "__main__":
    main()

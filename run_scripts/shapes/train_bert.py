"""Trains the bundled BERT of the Shapes world by masked words on the text of documents; TomeFormer connectors
start from it.

It reads with the language model's tokenizer, so train the language model first.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from recipe import muon_and_adamw, report, save_half, start, train
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from evlgen.datasets.shapes.documents import document, tag_line
from evlgen.datasets.shapes.world import scene

CONFIG = dict(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=80,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
_MASKED = 0.25  # share of words to be guessed; the mask is the <unk> token


def masked_batch(
    tokenizer: PreTrainedTokenizerBase, first: int, size: int, seed: int, rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and labels (-100 where nothing is asked), each [B, L]."""
    scenes = [scene("train", i, seed) for i in range(first, first + size)]
    texts = [f"{tag_line(s, rng)}\n{document(s, rng).text}" for s in scenes]
    tokens = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=CONFIG["max_position_embeddings"],
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    asked = (torch.rand(ids.shape) < _MASKED) & (mask == 1) & (ids != tokenizer.bos_token_id)
    return ids.masked_fill(asked, tokenizer.unk_token_id), mask, ids.masked_fill(~asked, -100)


def masked_loss(model: BertForMaskedLM, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the masked words."""
    hidden = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    asked = labels != -100
    return cross_entropy(model.cls(hidden[asked]), labels[asked])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder that has language/ and gets bert/")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's, for the matrices of the layers")
    parser.add_argument("--adamw-lr", type=float, default=3e-3, help="for everything else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    start(args.seed, args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.output / "language")
    model = BertForMaskedLM(
        BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **CONFIG)
    )
    rng = random.Random(f"bert/{args.seed}")
    last = args.steps * args.batch_size
    minutes = train(
        muon_and_adamw(model, args.lr, args.adamw_lr),
        lambda step: masked_loss(
            model, *masked_batch(tokenizer, step * args.batch_size, args.batch_size, args.seed, rng)
        ),
        args.steps,
    )
    model.eval()
    with torch.no_grad():
        loss = masked_loss(model, *masked_batch(tokenizer, last, 256, args.seed, rng)).item()
    folder = args.output / "bert"
    save_half(
        {
            k: v
            for k, v in model.bert.state_dict().items()
            if "word_embeddings" not in k and "position_ids" not in k
        },
        folder / "model.safetensors",
    )
    model.config.architectures = ["BertModel"]
    model.config.save_pretrained(folder)
    report(
        args.output / "bert.json",
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        adamw_lr=args.adamw_lr,
        seed=args.seed,
        minutes=round(minutes, 1),
        parameters=sum(p.numel() for p in model.bert.parameters()),
        loss_on_fresh_documents=round(loss, 4),
    )


if __name__ == "__main__":
    main()

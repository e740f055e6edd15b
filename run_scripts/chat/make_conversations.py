"""Makes conversations of Flickr8k's captions and DAQUAR's questions in the data root, where both are in the
layouts that ``projects/photos`` names: ``chat/train.jsonl`` and ``chat/val.jsonl``.

A conversation about a photograph of Flickr8k asks for a description and has a caption as answer, one of the
image's five unless more are asked for; in validation the other captions are right answers too. A conversation
about DAQUAR asks up to three questions about an image; in validation each question is one. Validation has
Flickr8k's validation images, and a tenth of DAQUAR's images.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from evlgen.files.io import cache_root, write_atomically

ASKED = (
    "Describe the image in one sentence.",
    "What is in this photograph?",
    "Write a caption for this image.",
    "What does the image show?",
)
SHORT = "Answer in a few words."
QUESTIONS = 3  # in a conversation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=cache_root(), help="the data root")
    parser.add_argument("--seed", type=int, default=42, help="of the order and of how captions are asked for")
    parser.add_argument(
        "--captions-per-image", type=int, default=1, help="conversations about a photograph of Flickr8k"
    )
    args = parser.parse_args()
    draw = random.Random(args.seed)
    questions = _daquar(args.root)
    for split in ("train", "val"):
        records = [*_captions(args.root, split, args.captions_per_image, draw), *questions[split]]
        draw.shuffle(records)
        path = args.root / "chat" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        print(f"{path}: {len(records)} conversations")


def _captions(root: Path, split: str, number: int, draw: random.Random) -> list[dict[str, Any]]:
    captions = defaultdict(list)
    for row in _rows(root / "flickr8k" / f"{split}.csv"):
        captions[row["image"]].append(" ".join(row["caption"].split()))
    records = []
    for image, texts in captions.items():
        known = {"id": image, "source": "flickr8k", "image": f"../flickr8k/{split}.zip/{image}"}
        for text in draw.sample(texts, min(number, len(texts))) if split == "train" else texts[:1]:
            record = {**known, "conversations": _turns([(draw.choice(ASKED), text)])}
            records.append(record if split == "train" else {**record, "references": texts[1:]})
    return records


def _daquar(root: Path) -> dict[str, list[dict[str, Any]]]:
    asked = defaultdict(list)
    for row in _rows(root / "daquar" / "train.csv"):
        asked[row["image"]].append((f"{row['question']} {SHORT}", row["answer"]))
    found: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for image, pairs in asked.items():
        known = {"source": "daquar", "image": f"../daquar/train.zip/{image}"}
        if hashlib.blake2b(image.encode(), digest_size=1).digest()[0] >= 26:  # a tenth of 256
            for start in range(0, len(pairs), QUESTIONS):
                turns = _turns(pairs[start : start + QUESTIONS])
                found["train"].append({"id": f"{image} {start}", **known, "conversations": turns})
            continue
        for number, pair in enumerate(pairs):
            found["val"].append({"id": f"{image} {number}", **known, "conversations": _turns([pair])})
    return found


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns += [
            {"from": "human", "value": f"<image>\n{question}" if number == 0 else question},
            {"from": "gpt", "value": answer},
        ]
    return turns


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()

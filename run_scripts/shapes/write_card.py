"""Writes ``CARD.md`` beside freshly trained backbones, out of the numbers the training scripts left there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CARD = """# The bundled backbones of the Shapes world

Small frozen parts that make training a connector possible without a download. They know 64-pixel images of coloured
shapes and the English said about them, and nothing else. Made by `bash run_scripts/make_shapes_backbones.sh`, seed
{seed}, on CPU cores without a GPU; all data is drawn and written by `evlgen/datasets/shapes` while training. Weights are
stored as float16 and computed in what the configuration asks for.

| part | file | what it is | parameters | training | minutes |
|---|---|---|---|---|---|
| vision encoder | `vision.safetensors` ({vision_mb} MB) | timm `vit_tiny_patch16_224` with {vision_kwargs} | {vision[parameters]:,} | {vision[steps]} steps of {vision[batch_size]} images | {vision[minutes]} |
| language model | `language/` ({language_mb} MB) | OPT: 4 layers, 128 wide, 256 positions; byte-level BPE of {language[vocabulary]} tokens | {language[parameters]:,} | {language[steps]} steps of {language[batch_size]} documents | {language[minutes]} |

## Vision encoder

Trained by attributes: linear read-outs of every patch token name the kind, colour, size, row and column of the shape that
covers the patch; one of the class token names what is in the image. It never saw a caption. The read-outs are not kept.
Pixels are scaled to -1..1 (mean and standard deviation 0.5). On 500 held-out images, share of right answers: {accuracy}.
(`image`: every kind, colour and the number right at once.)

## Language model

Trained on text alone: documents that describe one scene several times over, as captions, the same in other words, lists of
attributes in shuffled order, and questions with answers (`Question: what colour is the star? Short answer: red`). Most
documents open with a bag of words of the scene, one or several to a position (the sum of their embeddings, with a little noise),
so that the model uses what stands before a text: that is where soft prompts will stand. This makes it easy to steer, on purpose.
Matrices were trained with Muon, the rest with AdamW. It has seen no image. Loss on fresh documents: {language[loss_on_fresh_documents]}
nats per token. Conventions are OPT's: `</s>` (2) begins every text, `<pad>` is 1, and a line ends in a newline token.

## Connector

`connector/` (1.8 MB) is a TomeFormer (3 layers, 128 wide, r = 16: 65 visual tokens become 17 soft prompts) trained between the
two by `bash run_scripts/make_shapes_connector.sh`: 1,600 iterations of 64 images with one caption each. On the 500 images of
the test split, greedy captions of the bundled one: 89.0 % true to the scene with nothing left out, CIDEr 3.01; one human-like
reference scores 2.53 against the other four.

## No BERT

A TomeFormer may start from a BERT. One trained by masked words on these documents (3 layers, 128 wide) was tried and left
out: in one comparison, on an earlier language model, connectors that started from it were behind random ones after 100 steps
and no better after 500.

## Limits

Anything outside the Shapes world is unknown to them: the tokenizer can spell any text, but the language model knows about
two hundred words. They are for learning the framework, for tests and for comparing connectors, not for real images.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder with the trained backbones")
    folder: Path = parser.parse_args(argv).output
    parts = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("vision", "language")}
    files = {
        "vision": "vision.safetensors",
        "language": "language/model.safetensors",
    }
    values = parts | {
        f"{name}_mb": f"{(folder / file).stat().st_size / 1e6:.1f}" for name, file in files.items()
    }
    values["seed"] = parts["vision"]["seed"]
    values["accuracy"] = ", ".join(
        f"{name} {share:.4f}" for name, share in parts["vision"]["accuracy"].items()
    )
    values["vision_kwargs"] = ", ".join(
        f"`{name}={value}`" for name, value in parts["vision"]["kwargs"].items()
    )
    (folder / "CARD.md").write_text(CARD.format(**values), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Merging of soft prompts inside the language model (``model.language.tome``): what it saves, what it costs.

    python benchmarks/soft_prompt_merging.py --cfg-path projects/photos/flickr8k_lite.yaml \\
        --options model.checkpoint=checkpoints/photos [--images 200 --layer 2 --merged 0 0.25 0.5 0.75]

A model that never saw merged soft prompts in training captions validation photographs, and does training
steps on them, with fewer soft prompts behind a layer of its language model. The fractions take turns on every
batch, so that all of them meet the same machine; seconds are of the processor time of this process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import torch

from evlgen.assemble import make_builders
from evlgen.common.logs import quiet_libraries
from evlgen.config.config import Config
from evlgen.models.zoo import load_model_of
from evlgen.tasks.metrics.captioning import score_captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg-path", required=True)
    parser.add_argument("--options", nargs="*", default=[])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--merged", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    options = [*args.options, f"model.language.tome={{layer: {args.layer}, r: 0.5}}"]
    model = load_model_of(args.cfg_path, None, options, "cpu").eval()
    (builder,) = make_builders(Config.load(args.cfg_path, options)).values()
    dataset = builder.get_split("val")
    references = dataset.references()
    captions: dict[float, dict[str, str]] = defaultdict(dict)
    written, learned = defaultdict(list), defaultdict(list)
    step = len(dataset) // args.images
    for start in range(0, args.images, args.batch):
        chosen = range(start * step, min(start + args.batch, args.images) * step, step)
        batch = dataset.collater([dataset[index] for index in chosen])
        ids = batch["image_id"]
        texts_learned = {"image": batch["image"], "text_input": [references[i][0] for i in ids]}
        for share in args.merged:
            model.language._merging.r = share
            texts = model.generate({"image": batch["image"]}, max_length=24)
            captions[share].update(zip(ids, texts, strict=True))
            started = time.process_time()
            model.generate({"image": batch["image"]}, max_length=12, min_length=12)  # as long as the others
            written[share].append(time.process_time() - started)
            started = time.process_time()
            model(texts_learned)["loss"].backward()
            learned[share].append(time.process_time() - started)
            model.zero_grad()
    for share in args.merged:
        cider = score_captions(
            {i: references[i] for i in captions[share]}, captions[share], ["cider"]
        ).values["CIDEr"]
        print(
            f"{share:4.0%} fewer: CIDEr {cider:.3f}, "
            f"{statistics.median(written[share]):.2f} s to write {args.batch} texts of 12 tokens, "
            f"{statistics.median(learned[share]):.2f} s for a step",
            flush=True,
        )


if __name__ == "__main__":
    main()

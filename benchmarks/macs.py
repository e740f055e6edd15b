"""Multiply-accumulate operations of a forward pass for an image and its caption: EVL_Gen against BLIP-2.

    python benchmarks/macs.py [PROJECT.yaml ...]

Reads the connector, the vision encoder and the limit of text tokens from project files, by default those of
EVL_Gen's pretraining and of BLIP-2's second stage with OPT-2.7b, builds the published sizes without their
weights (the frozen parts on torch's meta device; nothing is downloaded) and counts matrix products and
attention.
BLIP-2's first stage, which EVL_Gen does without, comes on top of its second. A table in Markdown.
"""

from __future__ import annotations

import argparse

import timm
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from evlgen.common.registry import registry
from evlgen.config.config import Config

PROJECTS = ("projects/evlgen/pretrain_104m.yaml", "projects/blip2/reproduce_stage2.yaml")
# timm's architecture behind a name of ours, and which of its blocks are used
ENCODERS = {"eva_clip_g": ("eva_giant_patch14_clip_224", 39), "clip_L": ("vit_large_patch14_clip_224", 23)}
# facebook/opt-2.7b and -6.7b: config.json
LANGUAGE_MODELS = {
    "facebook/opt-2.7b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32},
    "facebook/opt-6.7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY, POSITIONS = 50272, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("projects", nargs="*", default=PROJECTS, metavar="PROJECT.yaml")
    rows = [(path, count(path)) for path in parser.parse_args().projects]
    print("GMACs of a forward pass for one image and its caption\n")
    print("| project | soft prompts | vision encoder | connector | language model | all |")
    print("|---|---|---|---|---|---|")
    for path, (prompts, parts) in rows:
        shown = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, sum(parts)))
        print(f"| {path} | {prompts} | {shown} |")


def count(project: str) -> tuple[int, tuple[int, int, int]]:
    """Soft prompts of a project's model, and the MACs of its vision encoder, connector and language model."""
    model = Config.load(project).model_plain()
    name, blocks = ENCODERS[model["vision"]["name"]]
    language = LANGUAGE_MODELS[model["language"]["name"]]
    parameters = {key: value for key, value in model["connector"].items() if key not in ("name", "init")}
    with torch.device("meta"):
        vision = timm.create_model(
            name, pretrained=False, num_classes=0, img_size=model["vision"]["image_size"]
        )
        del vision.blocks[blocks:]
        pixels = torch.zeros(1, 3, *[model["vision"]["image_size"]] * 2)
        reader = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=POSITIONS,
                ffn_dim=4 * language["hidden_size"],
                word_embed_proj_dim=language["hidden_size"],
                **language,
            )
        )
    tokens = torch.zeros(1, vision.patch_embed.num_patches + 1, vision.embed_dim)
    connector = registry.get_connector_class(model["connector"]["name"])(
        vision_dim=vision.embed_dim,
        language_dim=language["hidden_size"],
        num_tokens=tokens.shape[1],
        **parameters,
    ).eval()
    for part in (vision, connector, reader):
        part.requires_grad_(False)
    with torch.no_grad():
        prompts = connector(tokens).shape[1]
    embeddings = torch.zeros(1, prompts + model["max_txt_len"], language["hidden_size"], device="meta")
    parts = (
        macs(lambda: vision.forward_features(pixels)),
        macs(lambda: connector(tokens)),
        macs(lambda: reader(inputs_embeds=embeddings, use_cache=False)),
    )
    return prompts, parts


def macs(run) -> int:
    """Multiply-accumulate operations of a call; torch counts each as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    main()

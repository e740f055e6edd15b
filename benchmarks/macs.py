"""Operations and memory of the published sizes: EVL_Gen against BLIP-2.

    python benchmarks/macs.py [PROJECT.yaml ...]

Reads project files, by default those of EVL_Gen's pretraining and of BLIP-2's second stage with OPT-2.7b,
builds the published sizes without their weights (see `evlgen.estimate`; nothing is downloaded) and counts
matrix products and attention, with 32 tokens of text.
BLIP-2's first stage, which EVL_Gen does without, comes on top of its second. Two tables in Markdown: GMACs of
a forward pass for an image and its caption; computed memory at the peak of a training step in bf16, with
frozen language models as they are, and in 8 and 4 bits.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import transformers

from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.config.schema import build_dataclass
from evlgen.estimate import Estimate, estimate
from evlgen.files.io import resolve

PROJECTS = (
    "projects/evlgen/pretrain_104m.yaml",
    "projects/blip2/reproduce_stage2.yaml",
    "projects/evlgen/pretrain_vicuna7b.yaml",
)
# config.json of facebook/opt-2.7b and -6.7b, and of LLaMA 7b
_OPT = {"vocab_size": 50272, "num_hidden_layers": 32, "num_attention_heads": 32}


def _opt(width: int) -> transformers.OPTConfig:
    return transformers.OPTConfig(**_OPT, hidden_size=width, ffn_dim=4 * width, word_embed_proj_dim=width)


LANGUAGE_MODELS = {"opt-2.7b": _opt(2560), "opt-6.7b": _opt(4096), "vicuna-7b": transformers.LlamaConfig()}
TEXT_TOKENS = 32
BATCH_SIZES = (16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("projects", nargs="*", default=PROJECTS, metavar="PROJECT.yaml")
    projects = parser.parse_args().projects
    print("| project | soft prompts | vision encoder | connector | language model | all |")
    print("|---|---|---|---|---|---|")
    for project in projects:
        found = count(project)
        parts = [part.forward for part in found.parts.values()]
        shown = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, sum(parts)))
        print(f"| {project} | {found.num_soft_prompts} | {shown} |", flush=True)
    heads = " | ".join(f"batch {size}" for size in BATCH_SIZES)
    print(f"\n| project | frozen language model | weights and optimizer | {heads} |")
    print("|---|---|---|" + "---|" * len(BATCH_SIZES))
    for project in projects:
        for quantization in ("none", "8bit", "4bit"):
            found = count(project, quantization)
            sizes = (0, *BATCH_SIZES)
            shown = " | ".join(f"{found.memory(size) / 1e9:.1f} GB" for size in sizes)
            print(
                f"| {project} | {'bf16' if quantization == 'none' else quantization} | {shown} |", flush=True
            )


def count(project: str, quantization: str = "none") -> Estimate:
    """What a step of a project costs, at the sizes its language model's name stands for."""
    cfg = Config.load(project)
    section = cfg.model_plain()
    name = section["language"]["name"].rsplit("/")[-1]
    config = next(found for known, found in LANGUAGE_MODELS.items() if name.startswith(known))
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(resolve("evlgen://assets/shapes/language")).glob("tok*"):
            shutil.copy(file, folder)  # any tokenizer does: texts are counted in tokens
        config.save_pretrained(folder)
        section["language"].update(name=folder, quantization=quantization)
        section["connector"].pop("init", None)
        model = build_dataclass(registry.get_model_class(cfg.model.arch).CONFIG, section, path="model")
        return estimate(model, "bf16", text_tokens=TEXT_TOKENS)


if __name__ == "__main__":
    main()

"""Operations and memory of the published sizes: EVL_Gen against BLIP-2.

    python benchmarks/macs.py [PROJECT.yaml ...]

Reads project files, by default those of EVL_Gen's pretraining and of BLIP-2's two stages with OPT-2.7b,
builds the published sizes without their weights (see `evlgen.estimate`; nothing is downloaded) and counts
matrix products and attention, with 32 tokens of text.
BLIP-2's first stage, which EVL_Gen does without, comes before its second. Two tables in Markdown: GMACs of a
forward pass for an image and its caption, and operations of the whole training; computed memory at the peak
of a training step in bf16, with frozen language models as they are, and in 8 and 4 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.config.schema import build_dataclass
from evlgen.estimate import Estimate, PartCost, estimate
from evlgen.files.io import resolve
from evlgen.models.blip2_stage1 import Blip2Stage1
from evlgen.models.connectors import ConnectorInputs
from evlgen.models.connectors.qformer import QFormer
from evlgen.models.connectors.qformer_text import QFormerTokenizer
from evlgen.models.vision import build_vision_encoder

PROJECTS = (
    "projects/evlgen/pretrain_104m.yaml",
    "projects/blip2/reproduce_stage1.yaml",
    "projects/blip2/reproduce_stage2.yaml",
    "projects/evlgen/pretrain_vicuna7b.yaml",
)
# config.json of facebook/opt-2.7b and -6.7b, and of LLaMA 7b
_OPT = {"vocab_size": 50272, "num_hidden_layers": 32, "num_attention_heads": 32}


def _opt(width: int) -> transformers.OPTConfig:
    return transformers.OPTConfig(**_OPT, hidden_size=width, ffn_dim=4 * width, word_embed_proj_dim=width)


LANGUAGE_MODELS = {"opt-2.7b": _opt(2560), "opt-6.7b": _opt(4096), "vicuna-7b": transformers.LlamaConfig()}
BERT_WORDS = 30523  # of bert-base-uncased, and [DEC]
TEXT_TOKENS = 32
BATCH_SIZES = (16, 32, 64)
PROCESSES = 8  # GPUs of the published trainings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("projects", nargs="*", default=PROJECTS, metavar="PROJECT.yaml")
    projects = parser.parse_args().projects
    print(
        "| project | queries or soft prompts | vision encoder | connector | language model | all | training |"
    )
    print("|---|---|---|---|---|---|---|")
    for project in projects:
        found = count(project)
        parts = [part.forward for part in found.parts.values()]
        shown = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, sum(parts)))
        run = Config.load(project).run
        samples = (run.max_iters or 0) * run.batch_size_train * PROCESSES
        training = f"{found.flops * samples / 1e21:.2f} ZFLOP" if samples else ""
        print(f"| {project} | {found.num_soft_prompts} | {shown} | {training} |", flush=True)
    heads = " | ".join(f"batch {size}" for size in BATCH_SIZES)
    print(f"\n| project | frozen language model | weights and optimizer | {heads} |")
    print("|---|---|---|" + "---|" * len(BATCH_SIZES))
    for project in projects:
        has_language_model = "language" in Config.load(project).model_plain()
        for quantization in ("none", "8bit", "4bit") if has_language_model else ("none",):
            found = count(project, quantization)
            sizes = (0, *BATCH_SIZES)
            shown = " | ".join(f"{found.memory(size) / 1e9:.1f} GB" for size in sizes)
            language = {"none": "bf16" if has_language_model else ""}.get(quantization, quantization)
            print(f"| {project} | {language} | {shown} |", flush=True)


def count(project: str, quantization: str = "none") -> Estimate:
    """What a step of a project costs, at the sizes its language model's name stands for."""
    cfg = Config.load(project)
    if issubclass(registry.get_model_class(cfg.model.arch), Blip2Stage1):
        return count_first_stage(cfg.model)
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


class _Words(QFormerTokenizer):
    """Any tokenizer does, with as many words as BERT's."""

    def __len__(self) -> int:
        return BERT_WORDS


def count_first_stage(cfg) -> Estimate:
    """What a step of BLIP-2's first stage costs: all three losses, trained parts in bf16 by autocast."""
    meta = torch.device("meta")
    connector = {key: value for key, value in cfg.connector.items() if key not in ("name", "init")}
    tokenizer = _Words(str(resolve("evlgen://assets/shapes/language")), TEXT_TOKENS)
    with meta:
        vision_cfg = dataclasses.replace(
            cfg.vision, pretrained=False, grad_checkpoint=False, precision="bf16"
        )
        vision = build_vision_encoder(vision_cfg, meta)
        queries = QFormer.build(ConnectorInputs.behind(vision), **connector)
        positions = cfg.text.max_position_embeddings or queries.sizes.max_position_embeddings
        model = Blip2Stage1(
            vision, queries, tokenizer, positions, cfg.embed_dim, cfg.prompt, cfg.vision.freeze
        )
        model.set_norm(cfg.vision.norm_eps)
    model.to(meta).train()
    small, large = (_first_stage_step(model, cfg.vision.image_size, size) for size in BATCH_SIZES[:2])
    by_part, kept = large[0], (large[1] - small[1]) // BATCH_SIZES[0]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    vision_cost = PartCost(frozen, 0, 2 * frozen, by_part["vision"] // (2 * BATCH_SIZES[1]))
    others = by_part["forward"] - by_part["vision"]
    connector_cost = PartCost(0, trained, 16 * trained, others // (2 * BATCH_SIZES[1]))
    parts = {"vision": vision_cost, "connector": connector_cost, "language": PartCost(0, 0, 0, 0)}
    flops = by_part["all"] // BATCH_SIZES[1]
    kept_flops = flops - by_part["vision"] // BATCH_SIZES[1]
    return Estimate(parts, queries.num_query_token, TEXT_TOKENS, flops, kept_flops, kept // 2)


def _first_stage_step(model: Blip2Stage1, image_size: int, batch_size: int) -> tuple[dict[str, int], int]:
    """Operations of a forward pass, of the encoder's, and of a whole step; bytes kept in float32."""
    samples = {
        "image": torch.empty(batch_size, 3, image_size, image_size, device="meta"),
        "text_input": [" ".join(["a"] * TEXT_TOKENS)] * batch_size,
    }
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            alive.append(tensor)  # so that no other storage gets its address
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model(samples)["loss"]
        modules = {name.partition(".")[2]: sum(n.values()) for name, n in counter.get_flop_counts().items()}
        forward = counter.get_total_flops()
        loss.backward()
    counts = {"forward": forward, "vision": modules["vision"], "all": counter.get_total_flops()}
    return counts, sum(tensor.untyped_storage().nbytes() for tensor in alive if tensor.is_meta)


if __name__ == "__main__":
    main()

"""Parts of `gpu.sh`: the figures of a GPU at the published sizes, random weights made on the card.

    python benchmarks/gpu.py PART[:SECONDS] ... [--output FILE] [--dry-run]

Parts: captions, step, compile, fp8, memory, lengths, profile, scaling, each with the seconds it may take;
those of one command share models.

Each figure is printed, and added to FILE as a line of JSON, as soon as it is known. ``--dry-run`` does the
same at small sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from floor import profile
from harness import check_equal, compare
from inference import NEW_TOKENS, blip2, captioners
from step import LOSSES, TOKENIZER, OurStep, TextbookStep, batches, our_section
from textbook import PUBLISHED, Sizes, Textbook
from transformers import AutoTokenizer

from evlgen.common.logs import quiet_libraries
from evlgen.common.registry import registry
from evlgen.config.schema import build_dataclass
from evlgen.estimate import _without_weights, estimate
from evlgen.models.base_model import BaseModel
from evlgen.models.ops import use_fp8
from evlgen.models.published.checkpoints import to_own_names
from evlgen.models.token_merging import match_tokens, merge_schedule
from evlgen.runners.compilation import compile_blocks
from evlgen.runners.encoding_ahead import EncodedAhead

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dataclasses.replace(
    PUBLISHED,
    **{"vision_heads": 4, "vision_intermediate": 128},
    **{"vision_dim": 32, "layers": 2, "r": 3, "hidden": 32, "heads": 4, "intermediate": 64},
    **{"language_layers": 2, "language_dim": 32, "language_heads": 4, "vocabulary": 1000},
    vision_kwargs={**PUBLISHED.vision_kwargs, "depth": 2, "embed_dim": 32, "num_heads": 4},
    image_size=56,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What is measured: the sizes, and how much of it."""

    sizes: Sizes
    precision: str
    batch: int
    caption_batches: tuple[int, ...]
    rounds: int
    output: Path | None

    def report(self, what: str, **figures: Any) -> None:
        """Prints figures, and adds them to the file."""
        shown = {
            key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()
        }
        print(f"{what}: " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
        if self.output is not None:
            with self.output.open("a") as file:
                file.write(json.dumps({"what": what, "device": device_name(), **shown}) + "\n")


def device_name() -> str:
    return (
        torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The median time of a call, after one that does not count."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[len(taken[1:]) // 2]


# ---- models, made on the card ----


def textbook_on_card(setting: Setting) -> Textbook:
    """The textbook's model, its frozen parts in the setting's precision."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Textbook(setting.sizes, AutoTokenizer.from_pretrained(TOKENIZER))
    if setting.precision == "bf16":
        model.opt_model.to(torch.bfloat16)
        model.visual_encoder.to(torch.bfloat16)
    return model


def ours_on_card(
    setting: Setting, like: Textbook | None = None, arch: str = "evlgen_opt", **vision: Any
) -> BaseModel:
    """Our model, with the textbook's weights, or with random ones; ``vision``: further settings of it."""
    with tempfile.TemporaryDirectory() as folder:
        setting.sizes.opt_config().save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        section = our_section(setting.sizes, Path(folder), setting.precision)
        section["arch"], section["vision"] = arch, {**section["vision"], **vision}
        cls = registry.get_model_class(arch)
        config = build_dataclass(cls.CONFIG, section, path="model")
        model = _without_weights(config, setting.precision)
    model.to_empty(device=DEVICE)
    model.language.model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(float("norm" in name and name.endswith("weight")))
        for buffer in model.buffers():
            buffer.zero_()
    if like is not None:
        state = {key: value for key, value in like.state_dict().items() if not key.startswith("opt_model.")}
        found = model.load_state_dict(to_own_names(state), strict=False)
        if found.unexpected_keys or any(not key.startswith("language.") for key in found.missing_keys):
            raise SystemExit(f"the textbook's weights do not fit: {found}")
        model.language.model.load_state_dict(like.opt_model.state_dict())
    return model


@functools.cache
def our_step(setting: Setting) -> OurStep:
    """Our step, alone on the card."""
    return OurStep(setting.sizes, None, setting.precision, model=ours_on_card(setting))


@functools.cache
def both_steps(setting: Setting) -> tuple[OurStep, TextbookStep]:
    """Our step and the textbook's, from the same weights."""
    textbook = textbook_on_card(setting)
    ours = OurStep(setting.sizes, None, setting.precision, model=ours_on_card(setting, like=textbook))
    return ours, TextbookStep(setting.sizes, None, setting.precision, model=textbook)


# ---- parts ----


def captions(setting: Setting) -> None:
    """Captions per second, by CUDA graphs, against transformers' BLIP-2, and the time of the first."""
    os.environ["EVLGEN_CUDA_GRAPHS"] = "1"
    model = ours_on_card(setting).eval()
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    num_soft_prompts = model.connector.num_soft_prompts(model.vision.num_tokens)
    with torch.device(DEVICE):
        other = blip2(setting.sizes, num_soft_prompts, dtype)
    ours, theirs = captioners(model, other, dtype)
    size = setting.sizes.image_size
    images = torch.randn(max(setting.caption_batches), 3, size, size)
    started = time.perf_counter()
    ours(images[:1], 1)
    setting.report("first caption", seconds=time.perf_counter() - started)
    for batch in setting.caption_batches:
        for beams in (1, 5):
            pixels = images[:batch]
            found = compare(partial(ours, pixels, beams), partial(theirs, pixels, beams), setting.rounds, 2)
            rates = [batch / side.median for side in (found.ours, found.other)]
            how = f"beam {beams}" if beams > 1 else "greedy"
            setting.report(
                f"captions per second, batch {batch}, {how}",
                **{"ours": rates[0], "transformers": rates[1], "times as fast": rates[0] / rates[1]},
            )
    del other
    for batch in setting.caption_batches:
        for beams in (1, 5):
            write = partial(written, model, images[:batch], beams, dtype)
            write(graphs=True)  # recorded when it comes the second time
            texts = [write(graphs=graphs) for graphs in (True, False)]
            equal = sum(one == two for one, two in zip(*texts, strict=True))
            setting.report(
                f"texts with and without graphs, batch {batch}, beams {beams}", equal=equal, of=batch
            )


def written(
    model: BaseModel, images: torch.Tensor, beams: int, dtype: torch.dtype, graphs: bool
) -> list[str]:
    """Captions with or without CUDA graphs."""
    os.environ["EVLGEN_CUDA_GRAPHS"] = str(int(graphs))
    try:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            return model.generate({"image": images}, num_beams=beams, max_length=NEW_TOKENS)
    finally:
        os.environ["EVLGEN_CUDA_GRAPHS"] = "1"


def step(setting: Setting) -> None:
    """A training step against the textbook's: time, with kept visual tokens too, and peak memory."""
    ours, other = both_steps(setting)
    batch = setting.batch
    pixels = batches(setting.sizes, batch, DEVICE)
    sample = next(pixels)
    with torch.no_grad(), ours.accelerator.autocast():
        losses = [one.model.eval()(sample) for one in (ours, other)]
        for one in (ours, other):
            one.model.train()
    loss = losses[0]["loss"].item() if isinstance(losses[0], dict) else losses[0].item()
    check_equal(loss, float(losses[1]), 10 * LOSSES[setting.precision])
    setting.report("loss without dropout", ours=loss, textbook=float(losses[1]))
    found = compare(
        lambda: ours(next(pixels)), lambda: other(next(pixels)), setting.rounds + 2, 2, tolerance=None
    )
    setting.report(
        f"step, batch {batch}",
        **{"ours, s": found.ours.median, "textbook, s": found.other.median, "ratio": found.ratio},
        **{"samples/s": batch / found.ours.median},
    )
    tokens = [
        {"visual_tokens": ours.model.encode(made["image"]), "text_input": made["text_input"]}
        for made in (next(pixels) for _ in range(4))
    ]
    number = count()
    cached = seconds(lambda: ours(tokens[next(number) % len(tokens)]), setting.rounds + 2)
    setting.report(
        f"step from kept visual tokens, batch {batch}",
        **{"ours, s": cached, "textbook from pixels, s": found.other.median},
        ratio=cached / found.other.median,
    )
    ahead = EncodedAhead(pixels, ours.model)
    overlapped = seconds(lambda: ours(next(ahead), meanwhile=ahead.begin), setting.rounds + 2)
    setting.report(
        f"step, next images encoded ahead, batch {batch}",
        **{"ahead, s": overlapped, "ours, s": found.ours.median, "ratio": overlapped / found.ours.median},
    )
    if DEVICE.type == "cuda":
        memory = []
        for one in (ours, other):
            memory.append(peak(one, next(pixels)) / 1e9)
        setting.report(
            f"peak memory, batch {batch}",
            **{"ours, GB": memory[0], "textbook, GB": memory[1], "ratio": memory[0] / memory[1]},
        )
    parts(setting, ours, sample)


def peak(one: OurStep | TextbookStep, sample: dict[str, Any]) -> int:
    """Bytes on the card at the peak of a step, without what is there besides."""
    rest = torch.cuda.memory_allocated() - held(one)
    torch.cuda.reset_peak_memory_stats()
    one(sample)
    wait()
    return torch.cuda.max_memory_allocated() - rest


def held(one: OurStep | TextbookStep) -> int:
    """Bytes of a step's weights, gradients and moments."""
    tensors = {id(t): t for t in (*one.model.parameters(), *one.model.buffers())}
    moments = [t for state in one.optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in one.model.parameters() if p.grad is not None]
    return sum(t.nbytes for t in (*tensors.values(), *moments, *gradients) if isinstance(t, torch.Tensor))


def parts(setting: Setting, ours: OurStep, sample: dict[str, Any]) -> None:
    """Where the time of our step goes: forward passes alone."""
    model = ours.model
    with torch.no_grad(), ours.accelerator.autocast():
        tokens = model.encode(sample["image"])
        prompts = model.soft_prompts({"visual_tokens": tokens})
        found = {
            "vision": seconds(lambda: model.encode(sample["image"]), 3),
            "connector": seconds(lambda: model.soft_prompts({"visual_tokens": tokens}), 3),
            "language": seconds(
                lambda: model.sample_losses({**sample, "visual_tokens": tokens}, soft_prompts=prompts), 3
            ),
        }
    setting.report("forward of parts, s", **found)


def compiled(setting: Setting) -> None:
    """`run.compile`: until the first step is done, and a step then."""
    ours = our_step(setting)
    pixels = batches(setting.sizes, setting.batch, DEVICE)
    plain = seconds(lambda: ours(next(pixels)), setting.rounds + 2)
    compile_blocks(ours.model, backend="inductor" if DEVICE.type == "cuda" else "eager")
    started = time.perf_counter()
    ours(next(pixels))
    setting.report("compile", **{"ready after, s": time.perf_counter() - started})
    found = seconds(lambda: ours(next(pixels)), setting.rounds + 6)
    setting.report(
        f"compiled step, batch {setting.batch}",
        **{"compiled, s": found, "plain, s": plain, "ratio": found / plain},
    )


def fp8(setting: Setting) -> None:
    """Frozen linear layers in float8 against bf16: time, memory, and what changes; compiled too."""
    ours = OurStep(setting.sizes, None, setting.precision, model=ours_on_card(setting))
    model = ours.model
    pixels = batches(setting.sizes, setting.batch, DEVICE)
    sample = next(pixels)
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0

    def numbers() -> dict[str, torch.Tensor]:
        ours.optimizer.zero_grad()
        with ours.accelerator.autocast():
            tokens = model.encode(sample["image"])
            prompts = model.soft_prompts({"visual_tokens": tokens})
            loss = model(sample)["loss"]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.connector.parameters() if p.grad is not None])
        return {"visual tokens": tokens, "soft prompts": prompts, "gradient": gradient, "loss": loss}

    def size() -> int:
        return sum(p.nbytes for part in (model.vision, model.language) for p in part.parameters())

    before, bytes_before = numbers(), size()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    plain = seconds(lambda: ours(next(pixels)), setting.rounds + 2)
    use_fp8(model.vision, DEVICE)
    use_fp8(model.language, DEVICE, apart=[model.language.model.get_output_embeddings()])
    rounded = seconds(lambda: ours(next(pixels)), setting.rounds + 2)
    setting.report(
        f"fp8 step, batch {setting.batch}",
        **{"fp8, s": rounded, "plain, s": plain, "ratio": rounded / plain},
        **{"frozen weights, of plain": size() / bytes_before},
    )
    with torch.no_grad():  # the timed steps have trained the connector
        for name, weight in model.named_parameters():
            if name in start:
                weight.copy_(start[name])
    after = numbers()
    before_loss, after_loss = before.pop("loss").item(), after.pop("loss").item()
    cosines = {
        name: torch.cosine_similarity(before[name].float().flatten(), after[name].float().flatten(), dim=0)
        for name in before
    }
    setting.report(
        "fp8 against plain: cosines, and losses",
        **{name: value.item() for name, value in cosines.items()},
        **{"loss": after_loss, "plain loss": before_loss},
    )
    compile_blocks(model, backend="inductor" if DEVICE.type == "cuda" else "eager")
    compiled_step = seconds(lambda: ours(next(pixels)), setting.rounds + 2)
    setting.report("fp8 compiled step", **{"s": compiled_step, "of plain": compiled_step / plain})


def memory(setting: Setting) -> None:
    """Measured peaks of our step against computed ones."""
    ours, _ = both_steps(setting)
    with tempfile.TemporaryDirectory() as folder:
        setting.sizes.opt_config().save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        config = registry.get_model_class("evlgen_opt").CONFIG
        section = our_section(setting.sizes, Path(folder), setting.precision)
        computed = estimate(build_dataclass(config, section, path="model"), setting.precision, 16)
    for batch in (setting.batch // 4, setting.batch // 2, setting.batch):
        pixels = batches(setting.sizes, batch, DEVICE, count=2)
        figures = {"computed, GB": computed.memory(batch) / 1e9}
        ours(next(pixels))
        if DEVICE.type == "cuda":
            figures["measured, GB"] = peak(ours, next(pixels)) / 1e9
        setting.report(f"peak memory, batch {batch}", **figures)


def lengths(setting: Setting) -> None:
    """The first step at a length that was not met before, lengths rounded to multiples of 8 or not."""
    from evlgen.models.language import causal

    ours, _ = both_steps(setting)
    image = next(batches(setting.sizes, setting.batch, DEVICE, count=1))["image"]

    def first(number: int) -> float:
        started = time.perf_counter()
        ours({"image": image, "text_input": ["a " * number] * len(image)})
        return time.perf_counter() - started

    first(3), first(3)
    usual = first(3)
    rounded = [first(number) for number in range(4, 12)]
    usual_multiple, causal._length_multiple = causal._length_multiple, lambda device: 1
    each = [first(number) for number in range(12, 20)]
    causal._length_multiple = usual_multiple
    setting.report(
        "first steps at eight new lengths, s",
        **{"known length": usual, "rounded, mean": sum(rounded) / 8, "not rounded, mean": sum(each) / 8},
    )


def profiled(setting: Setting) -> None:
    """Our step against its matrix products alone."""
    ours, _ = both_steps(setting)
    pixels = batches(setting.sizes, setting.batch, DEVICE)
    profile(lambda: ours(next(pixels)), rounds=setting.rounds)


def scaling(setting: Setting) -> None:
    """One thing changes at a time: batch, length of the texts, r, size of the images, frames of videos."""
    is_small = setting.sizes is SMALL
    matching(setting)
    ours, other = both_steps(setting)
    batch = setting.batch // 2
    for size in dict.fromkeys((1, setting.batch // 8, batch, *(setting.batch * k for k in (2, 4, 8)))):
        measure(setting, "batch", size, (ours, other), size)
    for r in (0, setting.sizes.r // 2, setting.sizes.r):
        ours.model.connector.r = merge_schedule(r, setting.sizes.layers)
        other.model.VLconnector.r = r
        measure(setting, "r", r, (ours, other), batch)
    usual = other.model.max_txt_len
    for words in (8, 16) if is_small else (8, 32, 64, 128, 256):
        ours.model.language.max_txt_len = other.model.max_txt_len = max(usual, words + 4)
        measure(setting, "words", words, (ours, other), batch, words=words)
    ours.model.language.max_txt_len = other.model.max_txt_len = usual
    larger = dataclasses.replace(setting.sizes, image_size=2 * setting.sizes.image_size)
    larger_setting = dataclasses.replace(setting, sizes=larger)
    both = both_steps.__wrapped__(larger_setting)
    tokens = both[0].model.vision.num_tokens
    measure(larger_setting, "tokens", tokens, both, max(1, setting.batch // 8))
    del both
    model = ours_on_card(setting, arch="evlgen_video_opt", temporal={"form": "average"})
    model.vision.checkpoint(False)
    of_videos = OurStep(setting.sizes, None, setting.precision, model=model)
    for frames in (1, 2) if is_small else (1, 4, 16):
        measure(setting, "frames", frames, (of_videos,), max(1, setting.batch // 16), frames=frames)


def measure(
    setting: Setting,
    what: str,
    value: int,
    steps: tuple[OurStep | TextbookStep, ...],
    batch: int,
    words: int = 12,
    frames: int | None = None,
) -> None:
    """The time of a step of ours and of the textbook where one thing has changed; null without room."""
    size, in_time = setting.sizes.image_size, () if frames is None else (frames,)
    image = torch.randn(batch, 3, *in_time, size, size, device=DEVICE)
    sample = {"image": image, "text_input": ["a " * words] * batch}
    found: dict[str, float | None] = {}
    for name, one in zip(("ours, s", "textbook, s"), steps, strict=False):
        try:
            found[name] = seconds(lambda one=one: one(sample), 2)
        except torch.OutOfMemoryError:
            found[name] = None
            one.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    if all(found.values()) and len(found) == 2:
        found["ratio"] = found["ours, s"] / found["textbook, s"]
    setting.report(f"scaling, {what} {value}", **found)


def matching(setting: Setting) -> None:
    """Matching alone, whose similarities grow with the square of the tokens, and a layer's attention."""
    heads, batch = setting.sizes.heads, max(1, setting.batch // 16)
    width = setting.sizes.hidden // heads
    for tokens in (17, 65) if setting.sizes is SMALL else (257, 1025, 4097):
        keys = torch.randn(batch, heads, tokens, width, device=DEVICE)
        keys = keys.bfloat16() if setting.precision == "bf16" else keys
        metric = keys.mean(1)
        attention = partial(torch.nn.functional.scaled_dot_product_attention, keys, keys, keys)
        alone = seconds(lambda metric=metric: match_tokens(metric, setting.sizes.r), 5)
        setting.report(
            f"matching, {tokens} tokens, batch {batch}",
            **{"s": alone, "attention of a layer, s": seconds(attention, 5)},
        )


PARTS = {
    "captions": captions,
    "step": step,
    "compile": compiled,
    "fp8": fp8,
    "memory": memory,
    "lengths": lengths,
    "profile": profiled,
    "scaling": scaling,
}


def setting_of(dry_run: bool, output: Path | None) -> Setting:
    """The published sizes in bf16, or small ones in float32."""
    if dry_run:
        return Setting(SMALL, "fp32", 8, (1, 2), 1, output)
    return Setting(PUBLISHED, "bf16", 64, (1, 16, 64), 3, output)


def run(part: str, limit: int, setting: Setting) -> bool:
    """Runs a part; false where it failed, or was not ready in so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready in {limit} s")

    started = time.perf_counter()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        PARTS[part](setting)
    except (Exception, SystemExit) as error:  # the next part may do better
        setting.report(f"{part} failed", error=f"{type(error).__name__}: {error}"[:500])
        return False
    finally:
        signal.alarm(0)
    setting.report(f"{part} took", seconds=time.perf_counter() - started)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", metavar="PART[:SECONDS]", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="small sizes")
    args = parser.parse_args()
    quiet_libraries()
    setting = setting_of(args.dry_run, args.output)
    asked = [part.partition(":") for part in args.parts]
    times = 5 if args.dry_run else 1  # a CPU may be slow, and busy
    raise SystemExit(not all([run(part, times * int(limit or 600), setting) for part, _, limit in asked]))


if __name__ == "__main__":
    main()

"""The card of a published model, written from its configuration and its run."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
from huggingface_hub import EvalResult, HfApi, ModelCardData

from evlgen.common.registry import registry
from evlgen.common.safe_text import printable
from evlgen.config.catalogue import catalogue
from evlgen.config.layers import builder_name
from evlgen.files.io import CACHE_PREFIX, PACKAGE_PREFIX
from evlgen.models.publishing.run_facts import RunFacts
from evlgen.models.vision import vision_encoder_class
from evlgen.weights.hub import HUB_SECONDS, hub_reachable, looks_like_path
from evlgen.weights.hub_checkpoints import PARTS_FOLDER, SAMPLES_FOLDER

_HUB = "https://huggingface.co/"
_PAPER = "https://aclanthology.org/2024.acl-long.19"
_UNKNOWN = "not known here: see where it is from"
_OWN = "EVLGen's, BSD-3-Clause"
_REGISTERED_LICENCES = {
    "eva_clip_g": "MIT (EVA, github.com/baaivision/EVA)",
    "clip_L": "MIT (CLIP, github.com/openai/CLIP)",
}
_CITATION = """```bibtex
@inproceedings{jian2024expedited,
  title     = {Expedited Training of Visual Conditioned Language Generation via Redundancy Reduction},
  author    = {Jian, Yiren and Liu, Tingkai and Tao, Yunzhe and Zhang, Chunhui and Vosoughi, Soroush and Yang, Hongxia},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics},
  year      = {2024},
  doi       = {10.18653/v1/2024.acl-long.19}
}
```"""  # noqa: E501  one line of BibTeX each
_SCHEDULE = (
    *("max_epoch", "max_iters", "max_seconds", "batch_size_train", "accum_grad_iters", "lr_sched", "init_lr"),
    *("min_lr", "warmup_steps", "lr_scale", "weight_decay", "beta2", "max_grad_norm", "ema_decay"),
    *("precision", "seed"),
)
_NOT_SCORES = ("train_loss", "agg_metrics")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A caption of the model to show.

    Attributes:
        image: a PNG in the folder ``samples``.
        caption: what the model wrote.
        source: where the image is from, and under which licence.
    """

    image: str
    caption: str
    source: str


def write_card(
    name: str,
    config: Mapping[str, Any],
    facts: RunFacts | None = None,
    licence: str | None = None,
    samples: Sequence[Sample] = (),
    text: str | None = None,
) -> str:
    """The text of ``README.md``.

    Args:
        name: of the repository, ``user/name``.
        config: the published configuration: ``model``; ``datasets`` and ``run`` where they are known.
        facts: of the run; None where it is not known.
        licence: of the trained weights, as the hub names it, such as ``apache-2.0``.
        samples: captions to show.
        text: what the author says, Markdown, below the title.
    """
    model, run = config["model"], config.get("run") or {}
    parts = list(_parts(model))
    sections = [
        _front_matter(name, config, facts, licence, parts),
        f"# {_plain(name.rpartition('/')[2])}",
        text or _summary(model, run),
        _use(name, config, parts),
        "## Parts\n\n" + _table(("part", "what", "licence"), parts),
    ]
    if config.get("datasets"):
        sections.append("## Data\n\n" + "\n".join(_data(config["datasets"])))
    if facts is not None:
        sections.append("## Training\n\n" + _table(("", ""), _training(run, facts)))
        sections.append("## Scores\n\n" + _scores(name, facts))
    if samples:
        rows = [
            (f"![]({SAMPLES_FOLDER}/{sample.image})", _plain(sample.caption), _plain(sample.source))
            for sample in samples
        ]
        about = "The first samples of their folder or split, not chosen by their captions.\n\n"
        sections.append("## Samples\n\n" + about + _table(("image", "caption", "source"), rows))
    sections += ["## Limits\n\n" + _limits(facts), "## Citation\n\n" + _CITATION]
    return "\n\n".join(sections) + "\n"


def _front_matter(
    name: str,
    config: Mapping[str, Any],
    facts: RunFacts | None,
    licence: str | None,
    parts: Sequence[tuple[str, str, str]],
) -> str:
    model, run = config["model"], config.get("run") or {}
    is_video = _is_video(model)
    base = [what.partition("](")[0].lstrip("[") for _, what, _ in parts if f"]({_HUB}" in what]
    datasets = printable(", ".join(config.get("datasets") or {}) or "unknown", 200)
    results = [
        EvalResult(
            task_type="video-text-to-text" if is_video else "image-to-text",
            dataset_type=datasets,
            dataset_name=datasets,
            dataset_split=str(record["split"]),
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for record in (facts.evaluations if facts else ())
        for metric, value in _metrics(record).items()
    ]
    data = ModelCardData(
        library_name="evlgen",
        license=licence,
        pipeline_tag="video-text-to-text" if is_video else "image-to-text",
        base_model=base or None,
        tags=["evlgen", str(model["arch"]), *([str(run["task"])] if run.get("task") else [])],
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def _summary(model: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    task = f", trained for the task `{_code(run['task'])}`" if run.get("task") else ""
    kind = "videos" if _is_video(model) else "images"
    return (
        f"A visually conditioned language model that reads {kind}: a trained `{_code(_connector(model))}` "
        f"connector between a frozen vision encoder and a frozen language model{task}. Made with EVLGen "
        f"([paper]({_PAPER})); this repository holds what was trained, not the frozen parts, unless they are "
        f"in `{PARTS_FOLDER}/`."
    )


def _use(name: str, config: Mapping[str, Any], parts: Sequence[tuple[str, str, str]]) -> str:
    plugins = config.get("plugins") or []
    lines = ["## Use", ""]
    if plugins:
        named = ", ".join(f"`{_code(plugin)}`" for plugin in plugins)
        lines += [f"It needs plugins ({named}), which are code: get them, read them, and name them.", ""]
    extra = "".join(f" --plugins {_code(plugin)}" for plugin in plugins)
    lines += [
        "```",
        "pip install evlgen",
        f"evlgen caption --checkpoint {name}{extra} IMAGE...",
        "```",
        "```python",
        "from evlgen import registry",
        "",
        f'model = registry.get_model_class("{_code(config["model"]["arch"])}").from_pretrained("{name}")',
        "model.generate(image)  # a Pillow image, or a list of them",
        "```",
    ]
    if any(f"`{CACHE_PREFIX}" in what for _, what, _ in parts):
        lines += ["", "Parts below `cache://` have to be fetched first: see `run_scripts/` in EVLGen."]
    return "\n".join(lines)


def _parts(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(part, what it is with a link, its licence), all Markdown."""
    vision, connector, language = (model.get(key) or {} for key in ("vision", "connector", "language"))
    pretrained = vision.get("pretrained")
    name = str(vision.get("name"))
    size = f"{vision.get('image_size')} pixels"
    frozen = "frozen" if vision.get("freeze", True) else "trained"
    if isinstance(pretrained, str):
        place, licence = _place(pretrained), _OWN if pretrained.startswith(PACKAGE_PREFIX) else _UNKNOWN
        yield f"vision encoder, {frozen}", f"`{_code(name)}`, {size}, weights {place}", licence
    else:
        yield f"vision encoder, {frozen}", f"{_vision_link(name)}, {size}", _vision_licence(name)
    settings = {k: v for k, v in connector.items() if k not in ("name", "init") and v is not None}
    what = f"`{_code(_connector(model))}` {', '.join(f'{k} {v}' for k, v in settings.items())}".strip()
    yield "connector, trained", _plain(what, keep="`"), "this repository's"
    if connector.get("init"):
        yield "start of the connector", *_hub_part(str(connector["init"]))
    if language:
        frozen = "frozen" if language.get("freeze", True) else "trained"
        lora = language.get("lora")
        frozen += f", with trained adapters of rank {lora.get('r')}" if lora else ""
        yield f"language model, {frozen}", *_hub_part(str(language.get("name")))
    tokenizer = (model.get("text") or {}).get("tokenizer")
    if tokenizer:
        yield "tokenizer", *_hub_part(str(tokenizer))


def _hub_part(name: str) -> tuple[str, str]:
    if looks_like_path(name):
        return _place(name), _OWN if name.startswith(PACKAGE_PREFIX) else _UNKNOWN
    return f"[{name}]({_HUB}{name})", _hub_licence(name) or _UNKNOWN


def _hub_licence(name: str) -> str | None:
    """The licence that a model's page on the hub states, where it can be asked."""
    if not hub_reachable():
        return None
    try:
        card = HfApi().model_info(name, timeout=HUB_SECONDS).card_data
    except Exception:  # of huggingface_hub and its client: a card says less without it
        return None
    found = [card.get(key) for key in ("license_name", "license", "license_link")] if card else []
    named = [str(value) for value in found if value and value != "other"]
    return _plain(", ".join(dict.fromkeys(named))) or None


def _place(value: str) -> str:
    if value.startswith(PACKAGE_PREFIX):
        return f"`{_code(value)}`, part of the package"
    return f"`{_code(value)}`"


def _vision_link(name: str) -> str:
    url = vision_encoder_class(name).WEIGHTS_URL
    if url:
        return f"`{_code(name)}` ([weights]({url}))"
    known = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    if known is not None and known.hf_hub_id:
        return f"[{known.hf_hub_id}]({_HUB}{known.hf_hub_id})"
    return f"`{_code(name)}`"


def _vision_licence(name: str) -> str:
    if name in _REGISTERED_LICENCES:
        return _REGISTERED_LICENCES[name]
    known = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    return _plain(getattr(known, "license", None) or _UNKNOWN)


def _data(datasets: Mapping[str, Any]) -> Iterator[str]:
    entries = list(catalogue().values())
    for name, section in datasets.items():
        builder = builder_name(name, section)
        entry = next((entry for entry in entries if builder in entry.datasets), None)
        if entry is not None:
            yield f"- `{_code(name)}`: {_plain(entry.title)}. Licences: {_plain('; '.join(entry.licences))}"
        elif str(builder).startswith("shapes"):
            sizes = ", ".join(
                f"{section[k]} {k[:-5]}" for k in ("train_size", "val_size", "test_size") if section.get(k)
            )
            yield f"- `{_code(name)}`: the Shapes world, drawn by EVLGen ({sizes}); no licence is needed."
        else:
            yield f"- `{_code(name)}`: the author's own data (`{_code(builder)}`); licence: {_UNKNOWN}"


def _training(run: Mapping[str, Any], facts: RunFacts) -> Iterator[tuple[str, str]]:
    yield "task", f"`{_code(run.get('task', 'captioning'))}`"
    settings = ", ".join(f"{key} {run[key]}" for key in _SCHEDULE if run.get(key) is not None)
    yield "settings", _plain(settings)
    if facts.iteration is not None:
        seen = f", {facts.samples:,} samples seen" if facts.samples else ""
        yield "iterations", f"{facts.iteration:,}{seen}"
    machine = facts.machine
    if machine:
        count = machine.get("processes", 1)
        device = machine.get("device")
        device = machine.get("cpu") if device in (None, "cpu") else device
        cores = f", {machine.get('cores')} cores" if machine.get("device") == "cpu" else ""
        yield "hardware", _plain(f"{f'{count} x ' if count != 1 else ''}{device}{cores}")
    if facts.seconds:
        hours = facts.seconds / 3600
        taken = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        yield "time", f"{taken} of training, without evaluation"
    versions = [f"{key} {machine[key]}" for key in ("evlgen", "torch", "python") if machine.get(key)]
    if versions:
        yield "versions", _plain(", ".join(versions))


def _scores(name: str, facts: RunFacts) -> str:
    if not facts.evaluations:
        return "No evaluation of this checkpoint was logged."
    blocks = []
    for record in facts.evaluations:
        metrics = _metrics(record)
        split, count = record["split"], record.get("samples")
        header = tuple(_plain(metric) for metric in metrics)
        values = tuple(f"{value:.4f}" for value in metrics.values())
        blocks.append(f"Split `{_code(split)}`, {count} samples:\n\n" + _table(header, [values]))
    splits = ",".join(dict.fromkeys(_code(record["split"]) for record in facts.evaluations))
    command = (
        f"The command, with the data in place:\n\n```\n"
        f"hf download {name} --local-dir model\n"
        f"evlgen evaluate --cfg-path model/config.yaml --options model.checkpoint=model "
        f"run.test_splits=[{splits}]\n```"
    )
    return "\n\n".join([*blocks, command])


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The scores of an evaluation, and what the image is worth."""
    wanted = {**record}
    for key in (*_NOT_SCORES, *RunFacts.NOT_METRICS):
        wanted.pop(key, None)
    return {k: float(v) for k, v in wanted.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _limits(facts: RunFacts | None) -> str:
    lines = [
        "- It writes what is likely, which is not always what is shown: it counts badly, and names things "
        "that are not there.",
        "- What its training texts say about people, it repeats.",
        "- It reads what its frozen vision encoder sees, at one size; small text is lost.",
    ]
    if facts is not None and facts.evaluations:
        worth = facts.evaluations[-1].get("image_worth")
        if isinstance(worth, int | float):
            lines.append(f"- On the split above the right image is worth {worth:.2f} nats a token to it.")
        if facts.skipped:
            lines.append(f"- {facts.skipped} samples could not be read and were left out of the scores.")
    return "\n".join(lines)


def _connector(model: Mapping[str, Any]) -> str:
    return str((model.get("connector") or {}).get("name", "tomeformer"))


def _is_video(model: Mapping[str, Any]) -> bool:
    if (model.get("vision") or {}).get("temporal"):
        return True
    return registry.get_model_class(model["arch"]).TEMPORAL is not None


def _table(header: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _plain(text: object, keep: str = "") -> str:
    """Text as Markdown that shows just that, in a table's cell too, but for the characters in ``keep``."""
    text = html.escape(printable(text, 2000), quote=False)
    return "".join(f"&#{ord(c)};" if c in "\\`[]|" and c not in keep else c for c in text)


def _code(text: object) -> str:
    """Text between backticks."""
    return printable(text, 400).replace("`", "'").replace("|", "\\|")

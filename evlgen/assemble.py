"""From a configuration to a run: what is missing, then data, model, task and runner."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evlgen import __version__
from evlgen.common.errors import (
    CheckpointError,
    ConfigError,
    EVLGenError,
    TrainingError,
    did_you_mean,
)
from evlgen.common.registry import registry
from evlgen.config.config import Config
from evlgen.config.machine import MACHINE_FILE, machine_of_run
from evlgen.config.schema import config_of, parameters_of
from evlgen.config.yaml_io import read_yaml
from evlgen.files.io import cache_root, write_atomically
from evlgen.files.locks import sole_writer
from evlgen.weights.checkpoints import STATE_FOLDER, found_checkpoints, update_symlink
from evlgen.weights.needed import refuse_missing

if TYPE_CHECKING:
    from evlgen.datasets.base_dataset import BaseDataset
    from evlgen.runners.listener import Listener

logger = logging.getLogger(__name__)

_ENDS = ("max_epoch", "max_iters", "max_seconds", "test_splits")  # what a run ends with
_FEW_SAMPLES = 30  # whose score changes by chance as much as by training


def run(cfg: Config, listeners: Sequence[Listener] = ()) -> dict[str, dict[str, float]]:
    """Trains (or, with ``run.evaluate``, only evaluates) what a configuration describes.

    Args:
        listeners: besides those of ``run.listeners``.

    Returns:
        split name -> metrics of the evaluated splits.

    Raises:
        EVLGenError: whatever a user can fix; nothing heavy was loaded where that could be known before.
    """
    return run_stages([cfg], listeners)


def run_stages(stages: Sequence[Config], listeners: Sequence[Listener] = ()) -> dict[str, dict[str, float]]:
    """As `run`, the stages of a project file one after the other, each from the weights of the one before
    unless it names a checkpoint itself. With ``run.resume: auto`` the stages that are finished are left out,
    and the one that was interrupted goes on.

    Returns:
        What `run` gives, of the last stage.
    """
    from accelerate import PartialState

    checked = [_check(cfg) for cfg in stages]
    scores: dict[str, dict[str, float]] = {}
    start: str | None = None
    for cfg, (task, builders, own_listeners) in zip(stages, checked, strict=True):
        if start is not None and cfg.stage is not None and not cfg.stage.has_own_start:
            cfg = cfg.starting_from(start)
        scores, start = _run(cfg, task, builders, [*own_listeners, *listeners])
    PartialState().destroy_process_group()
    return scores


def _check(cfg: Config) -> tuple[Any, dict[str, Any], list[Listener]]:
    """Task, builders and listeners of a run, after all checks for which no weights and no data are read."""
    if cfg.run.evaluate and not cfg.model.checkpoint:
        raise ConfigError(
            "model.checkpoint: evaluating needs the trained weights, such as --options "
            "model.checkpoint=output/coco_ft/latest/checkpoints/best"
        )
    for key, problem in cfg.run.problems(list(cfg.datasets)):  # a file without a `run` section gets this far
        raise ConfigError(f"run.{key}: {problem}.")
    task = registry.get_task_class(cfg.run.task)(cfg.run)  # it may find fault with its settings
    builders = ready_builders(cfg)
    check_splits(cfg, builders)
    check_nothing_missing(cfg, builders)
    check_room(cfg, task)
    from evlgen.runners.listener import make_listeners
    from evlgen.runners.trackers import check_trackers

    listeners = make_listeners(cfg.run.listeners)
    check_trackers(cfg.run.trackers)
    return task, builders, listeners


def _run(
    cfg: Config, task: Any, builders: dict[str, Any], listeners: Sequence[Listener]
) -> tuple[dict[str, dict[str, float]], str | None]:
    """What `run` does after `_check`. Returns the scores, and the checkpoint of a stage that was trained."""
    from accelerate.utils import gather_object, set_seed

    from evlgen.common.logs import log_to_file
    from evlgen.loaders.mixed_plan import check_training_data
    from evlgen.runners.distribution import make_accelerator, peers_named

    accelerator = make_accelerator(cfg.run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(peers_named())
        stack.enter_context(writing_named(cfg.run.output_dir))
        restarted = any(gather_object([was_restarted()]))  # each machine counts its own failures only
        cfg = cfg.resuming() if restarted else cfg
        if cfg.stage is not None and (checkpoint := _finished_stage(cfg, accelerator, restarted)):
            logger.info("stage '%s' is finished: %s", cfg.stage.name, checkpoint)
            return {}, checkpoint
        folder = run_folder(cfg, accelerator, stack, restarted)
        stack.enter_context(log_to_file(folder / "log.txt", enabled=accelerator.is_main_process))
        if accelerator.is_main_process:
            logger.info("this run writes to %s", folder)
            write_atomically(folder / "config.yaml", cfg.to_yaml())
            facts = {"evlgen": __version__, **machine_of_run(accelerator.device, accelerator.num_processes)}
            write_atomically(folder / MACHINE_FILE, json.dumps(facts, indent=1))
        datasets = build_datasets(cfg, builders)
        check_training_data(cfg.run, datasets)
        set_seed(cfg.run.seed)  # before the model draws its first weights
        model = registry.get_model_class(cfg.model.arch).from_config(cfg.model, accelerator.device)
        runner = registry.get_runner_class(cfg.run.runner)(
            cfg.run, task, model, datasets, folder, cfg.to_dict(), accelerator, listeners
        )
        scores = runner.evaluate(cfg.run.test_splits) if cfg.run.evaluate else runner.train()
        accelerator.free_memory()
        return scores, None if cfg.stage is None else _trained_checkpoint(folder, accelerator)


def _finished_stage(cfg: Config, accelerator: Any, restarted: bool) -> str | None:
    """The checkpoint of a stage that is finished, where this run goes on with an earlier one."""
    from accelerate.utils import broadcast_object_list

    from evlgen.runners.facts import FACTS_FILE, read_facts

    found: list[str | None] = [None]
    if accelerator.is_main_process and not cfg.run.evaluate:
        folder = _begun_run(cfg, restarted)
        is_finished = folder is not None and read_facts(folder / FACTS_FILE).get("state") == "finished"
        if folder is not None and is_finished and not _asks_more(cfg, folder):
            found = [next(map(str, found_checkpoints(folder / "checkpoints")), None)]
    broadcast_object_list(found)
    return found[0]


def _asks_more(cfg: Config, folder: Path) -> bool:
    """Whether a stage is to be trained for another length, or tested on other splits, than a run of it."""
    before = read_yaml(folder / "config.yaml").get("run") or {}
    return any(getattr(cfg.run, key) != before.get(key) for key in _ENDS)


def _trained_checkpoint(folder: Path, accelerator: Any) -> str | None:
    """The newest checkpoint of a run, for all processes, once the first has written it."""
    from accelerate.utils import broadcast_object_list

    checkpoints = found_checkpoints(folder / "checkpoints") if accelerator.is_main_process else []
    found = [str(checkpoints[0]) if checkpoints else None]
    broadcast_object_list(found)
    return found[0]


def ready_builders(cfg: Config) -> dict[str, Any]:
    """The builders of all datasets of a configuration, by name, as a run has them. Reads no data.

    Raises:
        ConfigError: a dataset's section does not fit the model.
    """
    check_image_sizes(cfg)
    check_tiles(cfg)
    if cfg.env.cache_root:  # downloads and worker processes look there too
        os.environ.setdefault("EVLGEN_CACHE", cfg.env.cache_root)
    return make_builders(cfg)


def check_image_sizes(cfg: Config) -> None:
    """Raises `ConfigError` where a processor's image size differs from the vision encoder's."""
    defaults = registry.get_model_class(cfg.model.arch).processor_defaults(cfg.model)
    size = defaults.get("vis_processor", {}).get("image_size")
    for name, dataset in cfg.datasets.items():
        for role, section in (dataset.vis_processor or {}).items():
            if size and section.get("image_size", size) != size:
                path = f"datasets.{name}.vis_processor.{role}.image_size"
                raise ConfigError(
                    f"{path} ({cfg.source(path)}) is {section['image_size']}, but model.vision.image_size "
                    f"({cfg.source('model.vision.image_size') or 'default'}) is {size}. Leave the "
                    "processor's out: it follows."
                )


def check_tiles(cfg: Config) -> None:
    """Raises `ConfigError` where the model reads tiles and a processor gives none."""
    vision = getattr(cfg.model, "vision", None)
    for name, dataset in cfg.datasets.items() if getattr(vision, "tiles", None) else ():
        for role, section in (dataset.vis_processor or {}).items():
            if "max_tiles" not in parameters_of(registry.get_processor_class(section["name"])):
                path = f"datasets.{name}.vis_processor.{role}.name"
                raise ConfigError(
                    f"{path} ({cfg.source(path) or 'default'}): '{section['name']}' gives no tiles, "
                    "which model.vision.tiles asks for (blip2_image_train and blip_image_eval do; videos "
                    "have none). Name another, or set tiles to null."
                )


def make_builders(cfg: Config) -> dict[str, Any]:
    """The builders of all datasets of a configuration, by name. Reads no data."""
    root = cache_root(cfg.env.cache_root)
    builders = {}
    for name, section in cfg.datasets_plain().items():
        config = cfg.datasets[name]
        cls = registry.get_builder_class(config.builder)
        section.pop("builder", None)
        takes_keys = config_of(cls) is None
        builders[name] = cls(name=name, cache_root=root, **section) if takes_keys else cls(name, root, config)
    return builders


def check_splits(cfg: Config, builders: dict[str, Any]) -> None:
    """Raises `ConfigError` for a split that no dataset has."""
    known = sorted({split for builder in builders.values() for split in builder.splits})
    for key in ("train_splits", "valid_splits", "test_splits"):
        for split in getattr(cfg.run, key):
            if split in cfg.run.wanted_splits() and split not in known:
                path = f"run.{key}"
                raise ConfigError(
                    f"{path} ({cfg.source(path) or 'default'}): no dataset has a split "
                    f"'{split}'.{did_you_mean(split, known)} "
                    f"Splits: {', '.join(known)}.{_for_training_only(builders)}"
                )


def _for_training_only(builders: dict[str, Any]) -> str:
    """A remark for who asks shards for another split."""
    names = [name for name, builder in builders.items() if getattr(builder, "TRAINING_ONLY", False)]
    if not names:
        return ""
    return (
        f" {', '.join(names)}: shards, for training only. Add a dataset to validate on, or set "
        "run.valid_splits: []."
    )


def check_nothing_missing(cfg: Config, builders: dict[str, Any]) -> None:
    """Raises one `DataError` that lists all weights and data the run needs and this machine lacks, with the
    remedies.

    Weights that the hub offers are not missing where it can be reached: they are downloaded later.
    """
    model_class = registry.get_model_class(cfg.model.arch)
    weights = model_class.missing(cfg.model)
    data = [
        line
        for name, builder in builders.items()
        for line in builder.missing([s for s in cfg.run.wanted_splits() if s in builder.splits])
    ]
    refuse_missing(weights, data)


def check_room(cfg: Config, task: Any) -> None:
    """Raises `ConfigError` where texts as long as the settings allow do not fit into the language model
    beside the soft prompts: an evaluation would find out after an epoch."""
    model_class, run = registry.get_model_class(cfg.model.arch), cfg.run
    evaluates = bool(run.test_splits or (run.valid_splits and not run.evaluate))
    writes = evaluates and task.WRITES and run.inference_method == "generate"
    writes |= task.LEARNS_WRITING and not run.evaluate
    learns = not (run.evaluate or task.LEARNS_WRITING)
    prompt = None if task.ASKS else (cfg.model.prompt if run.prompt is None else run.prompt)
    processors = [p for section in cfg.datasets.values() for p in (section.vis_processor or {}).values()]
    frames = [processor.get("n_frms") or 1 for processor in processors]
    model_class.check_room(cfg.model, prompt, task.max_len if writes else 0, learns, max(frames, default=1))


def build_datasets(cfg: Config, builders: dict[str, Any]) -> dict[str, dict[str, BaseDataset]]:
    """Dataset name -> split -> dataset, of the splits the run touches."""
    from evlgen.datasets.overlap import warn_of_overlap
    from evlgen.loaders.mixed_plan import format_length

    datasets = {
        name: {
            split: builder.get_split(split) for split in cfg.run.wanted_splits() if split in builder.splits
        }
        for name, builder in builders.items()
    }
    for name, splits in datasets.items():
        for split, dataset in splits.items():
            logger.info("%s/%s: %s", name, split, format_length(dataset))
        if not cfg.run.evaluate:
            scored = [*cfg.run.valid_splits, *cfg.run.test_splits]
            warn_of_overlap(name, splits, cfg.run.train_splits, scored)
            if cfg.run.valid_splits:
                _warn_of_few_samples(name, cfg.run.valid_splits[0], splits)
    return datasets


def _warn_of_few_samples(name: str, split: str, splits: dict[str, BaseDataset]) -> None:
    """Of the split that decides which checkpoint is best."""
    if split in splits and 0 < (size := len(splits[split])) < _FEW_SAMPLES:
        logger.warning(
            "%s/%s has %d sample%s: a score of so few says little, and the checkpoint that it finds best may "
            "be any of them. Give the split at least %d, or look at the latest checkpoint too",
            name,
            split,
            size,
            "" if size == 1 else "s",
            _FEW_SAMPLES,
        )


def run_folder(cfg: Config, accelerator: Any, stack: contextlib.ExitStack, restarted: bool) -> Path:
    """The folder of this run: ``output_dir/<date-time>``, or, with ``resume: auto``, the newest one with a
    checkpoint. Where torchrun started the processes again (``restarted``), that of before. No other run
    writes to it until ``stack`` ends.

    Raises:
        TrainingError: it cannot be written to; another run is writing to it.
    """
    from accelerate.utils import broadcast_object_list

    chosen: list[str | None] = [None, None]
    if accelerator.is_main_process:
        try:
            with writing_named(cfg.run.output_dir):
                folder = _choose_folder(cfg, restarted)
                stack.enter_context(sole_writer(folder))
            chosen[0] = str(folder)
        except EVLGenError as error:
            chosen[1] = str(error)
    broadcast_object_list(chosen)
    name, problem = chosen
    if name is None:
        raise TrainingError(problem)
    return Path(name)


@contextlib.contextmanager
def writing_named(output_dir: str | Path) -> Iterator[None]:
    """Says plainly that a run cannot write its files: the disk is full, or somebody deleted the folder.

    Raises:
        TrainingError: instead of an `OSError` about a full disk, or about a file below ``output_dir``.
    """
    parent = Path(os.path.expanduser(output_dir)).absolute()
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, str | bytes)
        file = Path(os.fsdecode(error.filename)).absolute() if named else None
        is_own = file is not None and file.is_relative_to(parent)
        has_no_room = file is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        has_no_temporary = "No usable temporary directory" in str(error)
        if not (is_own or has_no_room or has_no_temporary):
            raise
        if has_no_temporary:
            why = f"{error.strerror}, as where the disk is full. Make room; then"
        elif isinstance(error, FileNotFoundError):
            why = "its folder was deleted or moved while the run went on. Put it back; then"
        else:
            why = f"{os.strerror(error.errno or 0)}. Make room or give rights there; then"
        raise TrainingError(
            f"run.output_dir: {file or parent} cannot be written: {why} run.resume=auto goes on from the "
            "newest whole checkpoint."
        ) from error


def _choose_folder(cfg: Config, restarted: bool) -> Path:
    parent = Path(os.path.expanduser(cfg.run.output_dir)).absolute()
    begun = _begun_run(cfg, restarted)
    if begun is not None:
        return begun if restarted else _current(begun)
    if cfg.run.resume and cfg.run.resume != "auto":
        checkpoint = Path(os.path.expanduser(cfg.run.resume)).resolve()
        if not os.path.isdir(checkpoint / STATE_FOLDER):
            raise CheckpointError(
                f"run.resume: {checkpoint} has no {STATE_FOLDER}/, so a run cannot go on from it. Name a "
                "folder under a run's "
                "checkpoints/, or use model.checkpoint to start from its weights."
            )
        if checkpoint.parent.name == "checkpoints":
            return _current(checkpoint.parent.parent)
    is_beside_training = cfg.run.evaluate and bool(found_checkpoints(parent / "latest" / "checkpoints"))
    return new_run_folder(parent, is_latest=not is_beside_training)


def _begun_run(cfg: Config, restarted: bool) -> Path | None:
    """The folder of the run that ``resume: auto`` goes on with, if there is one; of a stage only a run from
    the same weights: an older one followed another run of the stage before."""
    parent = Path(os.path.expanduser(cfg.run.output_dir)).absolute()
    latest = parent / (parent / "latest").resolve().name
    if restarted and os.path.isdir(parent / "latest") and _starts_like(latest, cfg):
        return latest  # what this command made, with or without a checkpoint
    if cfg.run.resume != "auto":
        return None
    runs = [p for p in parent.glob("*/") if not p.is_symlink() and (p / "checkpoints").is_dir()]
    runs = [p for p in runs if _starts_like(p, cfg)]
    # one that was stopped during its first save has none that is whole: it starts again, in its place
    runs = [p for p in runs if found_checkpoints(p / "checkpoints")] or runs
    # the run begun or continued last; names are times, and clocks are put back
    return latest if latest in runs else max(runs, default=None)


def _starts_like(folder: Path, cfg: Config) -> bool:
    """Whether a run of a later stage started from the checkpoint that this one starts from, wherever both
    have been moved to; true of any other run."""
    if cfg.stage is None or cfg.stage.number == 0 or cfg.stage.has_own_start:
        return True
    with contextlib.suppress(EVLGenError, OSError):
        saved = (read_yaml(folder / "config.yaml").get("model") or {}).get("checkpoint") or ""
        return Path(saved).parts[-3:] == Path(cfg.model.checkpoint or "").parts[-3:]
    return False


def _current(folder: Path) -> Path:
    """Points ``latest`` at a run that is continued."""
    if (folder.parent / "latest").is_symlink() and (folder.parent / "latest").resolve() == folder.resolve():
        return folder  # a full disk has no room for another link
    update_symlink(folder.parent / "latest", folder)
    return folder


def was_restarted() -> bool:
    """Whether torchrun started this run's processes again after one of them failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def new_run_folder(parent: Path, is_latest: bool = True) -> Path:
    """Makes ``parent/<date-time>`` and points ``parent/latest`` at it: but for an evaluation beside what was
    trained, whose checkpoints stay the latest. Raises `TrainingError` when that cannot be done."""
    name = time.strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(100):
            folder = parent / (name if attempt == 0 else f"{name}-{attempt}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
        if is_latest:
            update_symlink(parent / "latest", folder)
    except OSError as error:
        raise TrainingError(
            f"run.output_dir {parent} takes no files ({os.strerror(error.errno or 0)}). Name another folder."
        ) from error
    return folder

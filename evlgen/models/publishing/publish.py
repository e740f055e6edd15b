"""A checkpoint onto the Hugging Face hub, with its card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evlgen.files.io import write_atomically
from evlgen.models.publishing.card import Sample, write_card
from evlgen.models.publishing.folder import checkpoint_of, copy_for_others
from evlgen.models.publishing.run_facts import read_run_facts
from evlgen.weights.hub_checkpoints import CARD_FILE, SAMPLES_FOLDER, push_folder

#: Writes images into a folder and says what the model wrote about them.
MakeSamples = Callable[[Mapping[str, Any], Path], Sequence[Sample]]


def prepare_folder(
    source: str | Path,
    target: Path,
    name: str,
    options: Sequence[str] = (),
    with_parts: bool = False,
    licence: str | None = None,
    text: str | None = None,
    make_samples: MakeSamples | None = None,
) -> None:
    """Fills a folder with what is published of a checkpoint: weights, configuration, card, samples.

    Args:
        source: the folder of a checkpoint or of a run.
        target: an existing, empty folder.
        name: of the repository, ``user/name``.
        options, with_parts: see `copy_for_others`.
        licence, text: see `write_card`.
        make_samples: given the configuration and the folder ``samples`` of ``target``.
    """
    checkpoint = checkpoint_of(source)
    config = copy_for_others(checkpoint, target, options, with_parts)
    samples: Sequence[Sample] = ()
    if make_samples is not None:
        (target / SAMPLES_FOLDER).mkdir()
        samples = make_samples(config, target / SAMPLES_FOLDER)
    facts = read_run_facts(checkpoint)
    write_atomically(target / CARD_FILE, write_card(name, config, facts, licence, samples, text))


def publish(
    source: str | Path,
    name: str,
    *,
    message: str = "Checkpoint of evlgen",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    **prepare: Any,
) -> str:
    """Puts a checkpoint on the hub.

    Args:
        source: the folder of a checkpoint or of a run, whose best checkpoint is taken.
        name: ``user/name``.
        message, private, token, branch, create_pr: see `push_folder`.
        prepare: see `prepare_folder`.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError, ConfigError: see `copy_for_others` and `push_folder`.
    """
    with tempfile.TemporaryDirectory(prefix="evlgen-push-") as temporary:
        prepare_folder(source, Path(temporary), name, **prepare)
        return push_folder(Path(temporary), name, message, private, token, branch, create_pr)

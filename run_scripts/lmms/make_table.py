"""A table of images with captions as local tasks of lmms-eval: ``FOLDER/table.parquet`` for the tasks in
``run_scripts/lmms/tasks``, and ``FOLDER/table.csv`` with the same captions for evaluate.py.

``python run_scripts/lmms/make_table.py FOLDER CAPTIONS.csv IMAGES [--count 100]``, where the CSV has the
columns ``image`` and ``caption``, several rows for an image, and IMAGES is a folder or a zip of the images.
"""

from __future__ import annotations

import argparse
import csv
import random
import zipfile
from pathlib import Path

NUM_CHOICES = 4


def choices_of(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """For each image the first captions of it and of other images, in an order that is always the same."""
    rng = random.Random(0)
    found = {}
    for name in captions:
        others = rng.sample([other for other in captions if other != name], NUM_CHOICES - 1)
        found[name] = [captions[other][0] for other in [name, *others]]
        rng.shuffle(found[name])
    return found


def write_table(folder: Path, captions: dict[str, list[str]], images: dict[str, bytes]) -> None:
    """Writes ``table.parquet`` and ``table.csv``.

    Args:
        captions: of each image, the first of which no other image may have.
        images: the image files by the same names.
    """
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    choices = choices_of(captions)
    rows = [
        {
            "image": {"bytes": images[name], "path": name},
            "img_id": number,
            "caption": captions[name],
            "choices": choices[name],
            "answer": choices[name].index(captions[name][0]),
        }
        for number, name in enumerate(captions)
    ]
    texts = datasets.Sequence(datasets.Value("string"))
    number = datasets.Value("int64")
    features = datasets.Features(
        {"image": datasets.Image(), "img_id": number, "caption": texts, "choices": texts, "answer": number}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "table.parquet"))
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([name, caption] for name in captions for caption in captions[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("captions", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=100, help="images, the first of the table")
    args = parser.parse_args()
    captions: dict[str, list[str]] = {}
    with open(args.captions, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    captions = dict(list(captions.items())[: args.count])
    if args.images.is_dir():
        images = {name: (args.images / name).read_bytes() for name in captions}
    else:
        with zipfile.ZipFile(args.images) as archive:
            files = {Path(name).name: name for name in archive.namelist()}
            images = {name: archive.read(files[Path(name).name]) for name in captions}
    write_table(args.folder, captions, images)
    print(f"{len(captions)} images: {args.folder / 'table.parquet'}")


if __name__ == "__main__":
    main()

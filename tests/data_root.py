"""A data root in LAVIS's layout with something in every published set that a project file names.

Where the real small data is beside the checkout, it is that; what it lacks, and everything where it is
absent, are images and videos of the Shapes world under the published names.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from evlgen.datasets.shapes.captions import captions
from evlgen.datasets.shapes.world import draw, scene

COUNT = 4
SPLITS = ("train", "val", "test")


def make_data_root(root: Path, real: Path | None) -> Path:
    """Fills ``root``.

    Args:
        real: the real small data, or None.
    """
    if real is not None:
        for folder in real.iterdir():
            os.symlink(folder, root / folder.name)
    made = (_flickr8k, _flickr30k, _daquar, _conversations)
    for make in (_coco, _gqa, _nocaps, _okvqa, _videos, _shards, _visual_genome, _own, *made):
        make(root)
    return root


def _conversations(root: Path) -> None:
    places = {
        "chat": ("", ["train.jsonl", "val.jsonl"]),
        "llava_pretrain": ("images/", ["blip_laion_cc_sbu_558k.json"]),
        "llava_instruct": ("", ["llava_v1_5_mix665k.json"]),
    }
    for folder, (images, files) in places.items():
        (root / folder / images).mkdir(parents=True)
        records = []
        for index in range(COUNT):
            image(index).save(root / folder / images / f"{index}.png")
            turns = [("human", "<image>\nWhat is it?"), ("gpt", captions(scene("train", index))[0])]
            turns = [{"from": who, "value": text} for who, text in turns]
            records.append({"id": index, "image": f"{index}.png", "conversations": turns})
        for name in files:
            lines = "\n".join(map(json.dumps, records))
            (root / folder / name).write_text(lines if name.endswith("l") else json.dumps(records))


def image(index: int) -> Image.Image:
    """An image of the Shapes world, larger than its own 64 pixels."""
    return Image.fromarray(draw(scene("train", index))).resize((96, 72))


def write_video(path: Path, frames: int = 6) -> None:
    """A video in which one image becomes another."""
    import av

    first, last = (np.asarray(image(i)).astype(float) for i in range(2))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
        for t in np.linspace(0, 1, frames):
            frame = av.VideoFrame.from_ndarray(((1 - t) * first + t * last).astype(np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _coco(root: Path) -> None:
    if (root / "coco").exists():
        return
    names = [f"val2014/COCO_val2014_{i:012d}.jpg" for i in range(COUNT)]
    _images(root / "coco" / "images", names)
    rows = [{"image": n, "caption": captions(scene("train", i))} for i, n in enumerate(names)]
    flat = [{"image": r["image"], "caption": c, "image_id": r["image"]} for r in rows for c in r["caption"]]
    questions = [
        {"question_id": i, "question": "how many shapes are there?", "answer": ["two"] * 10, "image": n}
        for i, n in enumerate(names)
    ]
    asked = [{key: value for key, value in q.items() if key != "answer"} for q in questions]
    files = {
        **{f"coco_karpathy_{split}": flat if split == "train" else rows for split in SPLITS},
        **{f"vqa_{split}": questions for split in ("train", "val")},
        **dict.fromkeys(("vqa_val_eval", "vqa_test"), asked),
        "answer_list": ["one", "two"],
        **{f"v2_{name}": content for name, content in _official(questions).items()},
    }
    for name, content in files.items():
        _json(root / "coco" / "annotations" / f"{name}.json", content)


def _official(questions: list[dict]) -> dict[str, dict]:
    """VQAv2's own two files."""
    annotations = [
        {
            "question_id": q["question_id"],
            "image_id": q["question_id"],
            "question_type": "how many",
            "answer_type": "number",
            "answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(q["answer"])],
        }
        for q in questions
    ]
    asked = [
        {**{k: q[k] for k in ("question_id", "question")}, "image_id": q["question_id"]} for q in questions
    ]
    return {
        "OpenEnded_mscoco_val2014_questions": {"data_subtype": "val2014", "questions": asked},
        "mscoco_val2014_annotations": {"data_subtype": "val2014", "annotations": annotations},
    }


def _flickr8k(root: Path) -> None:
    """Tables, and zips of the images they name."""
    (root / "flickr8k").mkdir()
    for split in ("train", "val"):
        lines = ["image,caption"]
        with zipfile.ZipFile(root / "flickr8k" / f"{split}.zip", "w") as archive:
            for i in range(COUNT):
                content = io.BytesIO()
                image(i).save(content, format="JPEG")
                archive.writestr(f"{split}_{i}.jpg", content.getvalue())
                lines += [f'{split}_{i}.jpg,"{text}"' for text in captions(scene("train", i))]
        (root / "flickr8k" / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    published = {"train": "train", "val": "dev", "test": "test"}
    names = {split: [f"{split}_{i}.jpg" for i in range(2)] for split in published}
    everything = [name for of_one in names.values() for name in of_one]
    tokens = "".join(f"{name}#{i}\tA red image .\n" for name in everything for i in range(2))
    (root / "flickr8k" / "Flickr8k.token.txt").write_text(tokens, encoding="utf-8")
    for split, word in published.items():
        lines = "\n".join(names[split]) + "\n"
        (root / "flickr8k" / f"Flickr_8k.{word}Images.txt").write_text(lines, encoding="utf-8")
    _images(root / "flickr8k" / "Flicker8k_Dataset", everything)


def _daquar(root: Path) -> None:
    """Questions about photographs in an archive: the layout of ``projects/photos/daquar_lite.yaml``."""
    (root / "daquar").mkdir()
    lines = ["image,question,answer"]
    with zipfile.ZipFile(root / "daquar" / "train.zip", "w") as archive:
        for index in range(4):
            archive.writestr(f"image{index}.jpg", _jpeg(index))
            lines.append(f'image{index}.jpg,what is left of the chair ?,"table, lamp"')
    (root / "daquar" / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _flickr30k(root: Path) -> None:
    names = [f"flickr30k-images/{i}.jpg" for i in range(COUNT)]
    _images(root / "flickr30k" / "images", names)
    rows = [{"image": n, "caption": captions(scene("train", i))} for i, n in enumerate(names)]
    for split in ("val", "test"):
        _json(root / "flickr30k" / "annotations" / f"{split}.json", rows)


def _gqa(root: Path) -> None:
    if (root / "gqa").exists():
        return
    names = [f"n{i}.jpg" for i in range(COUNT)]
    _images(root / "gqa" / "images", names)
    rows = [
        {
            "image": n,
            "question": "is there a shape?",
            "question_id": str(i),
            "answer": "yes",
            "fullAnswer": "yes",
        }
        for i, n in enumerate(names)
    ]
    for split in ("train", "val", "testdev"):
        _json(root / "gqa" / "annotations" / f"{split}_balanced_questions.json", rows)


def _nocaps(root: Path) -> None:
    if (root / "nocaps").exists():
        return
    names = [f"{i}.jpg" for i in range(COUNT)]
    _images(root / "nocaps" / "images", names)
    for split in ("val", "test"):
        rows = [{"image": n, "img_id": i} for i, n in enumerate(names)]
        _json(root / "nocaps" / "annotations" / f"nocaps_{split}.json", rows)


def _okvqa(root: Path) -> None:
    folder = root / "okvqa" / "annotations"
    if folder.exists():
        return
    for name in ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations"):
        _json(folder / f"{name}.json", _load(root / "coco" / "annotations" / f"v2_{name}.json"))
    for theirs, ours in (("vqa_train", "okvqa_train"), ("vqa_val_eval",) * 2, ("answer_list",) * 2):
        _json(folder / f"{ours}.json", _load(root / "coco" / "annotations" / f"{theirs}.json"))


def _videos(root: Path) -> None:
    folder = root / "msrvtt"
    if not folder.exists():
        (folder / "videos").mkdir(parents=True)
        write_video(folder / "videos" / "video0.mp4")
        video = {"video": "video0.mp4", "image_id": "video0"}
        for split in SPLITS:
            texts = captions(scene("train", 0))
            flat = [{**video, "caption": text} for text in texts]
            _json(
                folder / "annotations" / f"cap_{split}.json",
                flat if split == "train" else [{**video, "caption": texts}],
            )
            asked = {
                "video": "video0.mp4",
                "question": "what is there?",
                "answer": "circle",
                "question_id": 0,
            }
            _json(folder / "annotations" / f"qa_{split}.json", [asked])
        _json(folder / "annotations" / "qa_ans2label.json", {"circle": 0, "square": 1})
    for name in ("msvd", "vatex"):
        os.symlink(folder, root / name)
    (root / "webvid" / "annotations").mkdir(parents=True)
    os.symlink(folder / "videos", root / "webvid" / "videos")
    os.symlink(folder / "annotations" / "cap_train.json", root / "webvid" / "annotations" / "webvid_2m.json")


def _shards(root: Path) -> None:
    if not (root / "ccs14m").exists():
        (root / "ccs14m").mkdir()
        for shard in range(2):
            with tarfile.open(root / "ccs14m" / f"{shard:05d}.tar", "w") as tar:
                for i in range(COUNT):
                    _add(tar, f"{shard}{i:04d}.jpg", _jpeg(i))
                    text = json.dumps({"caption": captions(scene("train", i))[0]})
                    _add(tar, f"{shard}{i:04d}.json", text.encode())
    os.symlink(root / "ccs14m", root / "laion115m")


def _visual_genome(root: Path) -> None:
    names = ["VG_100K/1.jpg", "VG_100K_2/2.jpg"]
    _images(root / "vg" / "images", names)
    rows = [{"image": n, "caption": captions(scene("train", i))[0]} for i, n in enumerate(names)]
    _json(root / "vg" / "annotations" / "vg_caption.json", rows)


def _own(root: Path) -> None:
    names = [f"{i}.jpg" for i in range(COUNT)]
    _images(root / "images", names)
    rows = [f"{name},{text}\n" for i, name in enumerate(names) for text in captions(scene("train", i))]
    (root / "my.csv").write_text("".join(["path,caption\n", *rows]))


def _images(folder: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(_jpeg(index))


def _jpeg(index: int) -> bytes:
    file = io.BytesIO()
    image(index).save(file, "JPEG")
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _load(path: Path):
    return json.loads(path.read_text())

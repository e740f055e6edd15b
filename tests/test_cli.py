"""The commands a user types, on the bundled model and on real photographs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from evlgen import cli, console, load_model, load_model_and_preprocess, model_zoo
from evlgen.common.errors import ConfigError, RegistryError
from evlgen.datasets.shapes.world import draw, scene

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(draw(scene("test", 3))).save(path)
    return path


def test_the_bundled_model_is_loaded_by_default_and_says_so(caplog):
    with caplog.at_level("WARNING"):
        model, images, texts = load_model_and_preprocess("evlgen_opt")
    assert "'shapes' of evlgen_opt is loaded" in caplog.text
    assert not model.training
    assert images["eval"](Image.new("RGB", (100, 50))).shape == (3, 64, 64)
    assert texts["eval"]("A Red Circle!") == "a red circle"


def test_wrong_names_are_named():
    with pytest.raises(RegistryError, match="'evlgen_opt'"):
        load_model("evlgen_op")
    with pytest.raises(ConfigError, match="'shapes'"):
        load_model("evlgen_opt", "shape")


def test_the_zoo_lists_architectures_and_types():
    assert dict(model_zoo)["evlgen_opt"] == [
        "shapes",
        "pretrain_opt2.7b",
        "pretrain_opt6.7b",
        "caption_coco_opt2.7b",
    ]
    assert "pretrain_opt6.7b" in str(model_zoo)


def test_caption_names_each_file_and_leaves_out_what_is_no_image(image, capsys):
    (image.parent / "text.jpg").write_text("not an image")
    assert cli.main(["caption", str(image.parent)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{image}: ") and len(out.strip().splitlines()) == 1
    assert "text.jpg" in err


def test_caption_with_a_saved_model_and_a_prompt(image, capsys, tmp_path):
    load_model("evlgen_opt", "shapes").save_pretrained(tmp_path / "saved")
    assert (
        cli.main(["caption", str(image), "--checkpoint", str(tmp_path / "saved"), "--prompt", "there is"])
        == 0
    )
    assert capsys.readouterr().out.startswith(str(image))


def test_caption_of_nothing_readable_fails(tmp_path, capsys):
    (tmp_path / "a.png").write_text("no")
    assert cli.main(["caption", str(tmp_path / "a.png")]) == 1
    assert "none of the 1 files" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["caption", "visualize"])
def test_a_named_path_that_gives_nothing_makes_the_exit_status_1(image, capsys, command):
    folder = image.parent
    for name in ("deep/er/b.png", "empty/x.txt", ".hidden/c.png"):
        (folder / name).parent.mkdir(parents=True)
    image.rename(folder / "deep" / "er" / "b.png")
    (folder / "deep" / "loop").symlink_to(folder / "deep", target_is_directory=True)
    (folder / "deep" / "er" / "broken.png").write_text("no")  # nobody named it
    options = ["--layers", "last", "--output", str(folder / "out")] if command == "visualize" else []
    argv = [command, "nofile.png", str(folder / "deep"), str(folder / "empty"), *options]
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    done = "captioned" if command == "caption" else "drawn"
    named = f"nofile.png, {folder / 'empty'}"
    assert err.splitlines()[-1] == f"error: 2 of the 3 paths named could not be {done}: {named}."
    assert cli.main([command, str(folder / "deep"), *options]) == 0


def test_help_and_import_do_not_import_torch():
    code = """if True:
        import sys, evlgen, evlgen.cli
        try:
            evlgen.cli.train(["--help"])
        except SystemExit:
            pass
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_the_plugin_example_trains(tmp_path, capsys):
    options = [f"run.output_dir={tmp_path}", "run.max_epoch=25"]
    assert cli.train(["--cfg-path", str(ROOT / "examples" / "plugin.yaml"), "--options", *options]) == 0
    metrics = json.loads((tmp_path / "latest" / "result" / "test" / "metrics.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "latest" / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["type"] == "train"]
    assert losses[-1] < losses[0]
    exact = [r["exact"] for r in records if r["type"] == "evaluation"]
    assert exact[-1] >= 0.75 and "Bleu_4" in metrics


def test_real_photographs_train_evaluate_and_score(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(shared / "data" / "lavis_cache"))
    options = [
        "model.model_type=shapes",
        "run.max_epoch=2",
        "run.init_lr=1e-3",
        "run.warmup_steps=0",
        "run.log_freq=1",
    ]
    options += [f"run.output_dir={tmp_path / 'ft'}", "run.metrics=[bleu,rouge_l,cider]"]
    assert cli.train(["--cfg-path", "projects/evlgen/coco_ft.yaml", "--options", *options]) == 0
    folder = tmp_path / "ft" / "latest"
    captions = json.loads((folder / "result" / "test" / "captions.json").read_text())
    assert sorted(c["image_id"] for c in captions) == [900007, 900008]
    metrics = json.loads((folder / "result" / "test" / "metrics.json").read_text())
    assert {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr", "agg_metrics"} <= metrics.keys()
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["type"] == "train"]
    assert losses[-1] < losses[0]
    options = [
        "model.model_type=shapes",
        f"model.checkpoint={folder / 'checkpoints' / 'best'}",
        "run.metrics=[bleu,cider]",
    ]
    options += [f"run.output_dir={tmp_path / 'eval'}"]
    assert cli.evaluate(["--cfg-path", "projects/evlgen/coco_eval.yaml", "--options", *options]) == 0
    again = json.loads((tmp_path / "eval" / "latest" / "result" / "test" / "captions.json").read_text())
    assert again == captions


def test_your_own_images_are_scored_against_your_own_captions(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(shared / "data" / "lavis_cache"))  # it has COCO's ground truth
    Image.new("RGB", (64, 64), "red").save(tmp_path / "900007.jpg")
    (tmp_path / "train.json").write_text('[{"image": "900007.jpg", "caption": "red", "image_id": "1"}]')
    (tmp_path / "val.json").write_text('[{"image": "900007.jpg", "caption": ["all red", "red"]}]')
    source = "datasets.coco_caption.build_info"
    options = [f"{source}.annotations.{split}.storage={tmp_path / split}.json" for split in ("train", "val")]
    options += [
        f"{source}.images.storage={tmp_path}",
        "run.test_splits=[]",
        f"run.output_dir={tmp_path / 'out'}",
    ]
    options += ["model.model_type=shapes", "run.max_epoch=1", "run.batch_size_train=1", "run.metrics=[bleu]"]
    from evlgen.assemble import make_builders
    from evlgen.config.config import Config

    cfg = Config.load("projects/evlgen/coco_ft.yaml", options)
    assert make_builders(cfg)["coco_caption"].get_split("val").references() == {900007: ["all red", "red"]}
    assert cli.train(["--cfg-path", "projects/evlgen/coco_ft.yaml", "--options", *options]) == 0


def test_without_weights_and_data_everything_missing_is_named_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVLGEN_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert cli.train(["--cfg-path", "projects/evlgen/coco_ft.yaml"]) == 1
    shown = capsys.readouterr().err
    wanted = [
        "eva_vit_g.pth",
        "facebook/opt-2.7b",
        "hf download",
        "bert-base-uncased",
        "coco_karpathy_train.json",
        "python -m evlgen download coco",
    ]
    assert [w for w in wanted if w not in shown] == []
    assert len(shown.splitlines()) < 40
    assert not list(tmp_path.glob("*"))


def test_a_name_that_the_system_cannot_write_is_an_error_of_ours(monkeypatch, capsys):
    def name_it(args):
        "/data/für_☃.png".encode("ascii")

    parser = console.Parser()
    parser.add_argument("--debug", action="store_true")
    monkeypatch.setattr(console.sys, "getfilesystemencoding", lambda: "ascii")
    assert console.guarded(name_it, parser, []) == 1
    shown = capsys.readouterr().err
    assert (
        "cannot be the name of a file: this system writes names in ascii" in shown and "PYTHONUTF8=1" in shown
    )
    with pytest.raises(UnicodeEncodeError):
        console.guarded(name_it, parser, ["--debug"])

"""An index of images: what is found, by text and by image; resumed, damaged, of another model; quick."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from evlgen import cli, image_search
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config
from evlgen.datasets.shapes.world import draw, scene
from evlgen.image_search import ImageIndex, index_images, model_key, similarities

TEXT = "a red circle"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two first stages."""
    folders = []
    connector = {"name": "qformer", "num_query_token": 4, "num_layers": 2, "hidden_size": 32}
    connector |= {"num_attention_heads": 4, "intermediate_size": 48}
    for seed in range(2):
        torch.manual_seed(seed)
        cfg = load_model_config("blip2", "shapes", overrides={"connector": connector})
        model = registry.get_model_class("blip2").from_config(cfg)
        with torch.no_grad():  # or all images and texts are nearly alike
            for p in model.parameters():
                if p.requires_grad and p.ndim:
                    p.add_(torch.randn(p.shape) * 0.2)
        folders.append(model.save_pretrained(tmp_path_factory.mktemp("models") / str(seed)))
    return folders


@pytest.fixture(scope="module")
def model(models):
    return registry.get_model_class("blip2").from_pretrained(models[0])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i in range(7):
        Image.fromarray(draw(scene("test", i))).save(folder / ("deep" if i % 2 else ".") / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def index(photos, model, tmp_path):
    path = tmp_path / "photos.index"
    assert index_images([str(photos)], path, model, batch_size=3) == 7
    return path


def test_what_is_found_is_what_comparing_each_by_hand_finds(index, model, photos):
    found = ImageIndex.open(index).search(model, TEXT, k=4)
    paths = sorted(str(p) for p in photos.rglob("*.png"))
    by_hand = similarities(model, paths, [TEXT, "two stars"], batch_size=2)
    assert by_hand.shape == (7, 2)
    slow = [model.match({"image": Image.open(p), "text_input": [TEXT]}, "itc").item() for p in paths]
    assert by_hand[:, 0].tolist() == pytest.approx(slow, abs=1e-5)
    best = by_hand[:, 0].sort(descending=True)
    assert [path for path, _ in found] == [paths[i] for i in best.indices[:4]]
    assert [score for _, score in found] == pytest.approx(best.values[:4].tolist(), abs=2e-3)


def test_an_image_finds_itself_first(index, model, photos):
    (path, score), *others = ImageIndex.open(index).search(model, Image.open(photos / "4.png"), k=100)
    assert path == str(photos / "4.png") and score == pytest.approx(1, abs=2e-3)
    assert len(others) == 6 and all(other < score for _, other in others)


def test_reranking_orders_the_best_by_matching(index, model):
    opened = ImageIndex.open(index)
    first = dict(opened.search(model, TEXT, k=3))
    again = opened.search(model, TEXT, k=2, rerank=3)
    expected = {
        path: score + model.match({"image": Image.open(path), "text_input": [TEXT]})[0, 1].item()
        for path, score in first.items()
    }
    assert again == [(p, pytest.approx(s)) for p, s in sorted(expected.items(), key=lambda row: -row[1])[:2]]
    with pytest.raises(ConfigError, match="needs a text"):
        opened.search(model, Image.new("RGB", (8, 8)), rerank=3)


def test_only_what_is_new_or_changed_is_read_again(index, model, photos, monkeypatch):
    whole = load_file(index)
    os.unlink(photos / "0.png")
    Image.fromarray(draw(scene("test", 9))).save(photos / "2.png")
    Image.fromarray(draw(scene("test", 8))).save(photos / "8.png")
    read = []
    original = image_search.read_files
    monkeypatch.setattr(image_search, "read_files", lambda n, *a: original(read.extend(n) or n, *a))
    assert index_images([str(photos)], index, model) == 7
    assert [os.path.basename(path) for path in read] == ["2.png", "8.png", "broken.jpg"]
    opened = ImageIndex.open(index)
    assert opened.paths == sorted(map(str, photos.rglob("*.png")))
    kept = opened.paths.index(str(photos / "4.png"))
    assert torch.equal(opened.features[kept], whole["features"][2])  # after 0.png and 2.png
    assert not torch.equal(opened.features[0], whole["features"][0])


def test_the_time_to_find_what_is_new_grows_with_the_number_of_images_alone(
    index, model, photos, monkeypatch
):
    made = []
    monkeypatch.setattr(image_search, "set", lambda names: made.append(names) or set(names), raising=False)
    assert index_images([str(photos)], index, model) == 7
    assert len(made) < 5, "one for each image takes hours at a million"


def test_a_killed_call_goes_on_from_what_it_had_written(photos, model, tmp_path, monkeypatch):
    path = tmp_path / "half.index"
    monkeypatch.setattr(image_search, "SAVE_EVERY", 0)
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = image_search.image_features
    monkeypatch.setattr(image_search, "image_features", killed)
    with pytest.raises(KeyboardInterrupt):
        index_images([str(photos)], path, model, batch_size=2)
    assert len(ImageIndex.open(path)) == 4 and not list(tmp_path.glob(".half*"))
    assert index_images([str(photos)], path, model, batch_size=2) == 7
    assert len(calls) == 5  # two batches, the one that was killed, and two for the three that were left


def test_what_is_wrong_with_an_index_is_named(index, model, models, photos, tmp_path):
    other = registry.get_model_class("blip2").from_pretrained(models[1])
    with pytest.raises(ConfigError, match="made by another model"):
        ImageIndex.open(index).search(other, TEXT)
    with pytest.raises(ConfigError, match="made by another model"):
        index_images([str(photos)], index, other)
    with pytest.raises(DataError, match="there is no index at"):
        ImageIndex.open(tmp_path / "none.index")
    content = index.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1]), b"x" * 100):
        (tmp_path / "damaged.index").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged: .*Delete it"):
            ImageIndex.open(tmp_path / "damaged.index")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.index")
    with pytest.raises(DataError, match="not an index of images"):
        ImageIndex.open(tmp_path / "other.index")
    opened = ImageIndex.open(index)
    opened.features = opened.features.clone()
    opened.features[3, 1] = torch.nan
    with pytest.raises(DataError, match="not numbers"):
        opened.search(model, TEXT)
    with pytest.raises(DataError, match="none of the 1 files"):
        index_images([str(photos / "broken.jpg")], tmp_path / "new.index", model)
    assert not (tmp_path / "new.index").exists()
    with pytest.raises(ConfigError, match=r"features that EvlgenOPT does not have.*model\.arch: blip2"):
        similarities(
            registry.get_model_class("evlgen_opt").__new__(registry.get_model_class("evlgen_opt")), [], []
        )


def test_the_commands(photos, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "new.index")
    assert cli.main(["index", "photos", "--output", path, "--checkpoint", str(models[0])]) == 0
    assert capsys.readouterr().out == f"{path}: 7 images\n"
    assert cli.main(["search", path, TEXT, "-k", "3"]) == 0  # the model is known
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split()[1].endswith(".png") for line in lines)
    assert cli.main(["search", path, "photos/4.png", "-k", "1"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"  {photos / '4.png'}")
    assert cli.main(["search", path, TEXT, "--checkpoint", str(models[1])]) == 1
    assert "made by another model" in capsys.readouterr().err
    assert cli.main(["index", str(photos / "broken.jpg"), str(photos), "--output", path]) == 1
    assert "name a first stage" in capsys.readouterr().err
    again = ["index", str(photos / "broken.jpg"), str(photos), "--output", path, "--checkpoint"]
    assert cli.main([*again, str(models[0])]) == 1, "a file that was named could not be read"


def test_a_model_is_known_by_all_of_its_weights(model):
    before = model_key(model)
    with torch.no_grad():
        model.connector.layers[1].down.weight[0, 0] += 1
        assert model_key(model) != before
        model.connector.layers[1].down.weight[0, 0] -= 1


def test_the_nearest_of_many_are_found_whichever_part_they_are_in():
    """20,000 images of 32 queries and 256 channels, which are searched in parts."""
    features = F.normalize(torch.randn(2000, 32, 256), dim=-1).half().repeat(10, 1, 1)
    query = features[777, 5].float()
    places, scores = image_search._nearest(features, query, 10)
    assert set(places.tolist()) == {777 + 2000 * i for i in range(10)}
    assert scores.tolist() == pytest.approx([1] * 10, abs=1e-3)

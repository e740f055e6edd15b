"""Names that a user of LAVIS types: loading datasets, processors, and the first stage of BLIP-2."""

from __future__ import annotations

import pytest
import torch
from data_root import make_data_root
from PIL import Image

from evlgen import dataset_zoo, load_dataset, load_model_and_preprocess, load_preprocess, registry
from evlgen.assemble import run
from evlgen.common.errors import ConfigError, DataError, EVLGenError
from evlgen.config.config import Config, load_model_config
from evlgen.models.blip2_stage1 import Blip2Stage1

LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_data_root(tmp_path_factory.mktemp("cache"), None)


@pytest.fixture
def cache(root, monkeypatch):
    monkeypatch.setenv("EVLGEN_CACHE", str(root))
    return root


def test_a_dataset_is_loaded_by_name_with_images_and_texts_as_they_are(cache, caplog):
    dataset = load_dataset("coco_caption")
    assert dataset.keys() == {"train", "val", "test"}
    sample = dataset["train"][0]
    assert isinstance(sample["image"], Image.Image) and isinstance(sample["text_input"], str)
    assert isinstance(dataset["val"][0]["image"], Image.Image)
    questions = load_dataset("gqa")  # of which the data root has some splits only
    assert questions.keys() == {"train", "val", "testdev"}
    assert "gqa: the test annotation is not at" in caplog.text
    assert isinstance(questions["val"][0]["image"], Image.Image) and questions["val"][0]["text_input"]


def test_a_datasets_file_and_folder_can_be_named(cache, tmp_path):
    file = tmp_path / "mine.yaml"
    processor = "{train: {name: blip2_image_train, image_size: 32}}"
    file.write_text(f"datasets: {{coco_caption: {{vis_processor: {processor}}}}}\n")
    dataset = load_dataset("coco_caption", cfg_path=file)
    assert dataset["train"][0]["image"].shape == (3, 32, 32)
    assert isinstance(dataset["val"][0]["image"], Image.Image)
    folder = cache / "coco" / "images"
    assert isinstance(load_dataset("coco_caption", vis_path=folder)["train"][0]["image"], Image.Image)
    with pytest.raises(DataError, match="elsewhere"):
        load_dataset("coco_caption", vis_path=tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no folder of videos"):
        load_dataset("coco_caption", vis_path=folder, data_type="videos")
    file.write_text("datasets: {gqa: {}, ok_vqa: {}}\n")
    with pytest.raises(ConfigError, match="no `coco_caption`"):
        load_dataset("coco_caption", cfg_path=file)
    with pytest.raises(EVLGenError, match="coco_caption"):
        load_dataset("coco_captions")


def test_the_dataset_zoo_lists_what_is_registered():
    assert dataset_zoo.get_names() == list(dataset_zoo) == registry.list_datasets()
    assert "coco_caption" in str(dataset_zoo) and len(dataset_zoo) == len(registry.list_datasets())


def test_processors_are_built_from_a_section():
    config = {
        "vis_processor": {"eval": {"name": "blip_image_eval", "image_size": 48}},
        "text_processor": {"train": {"name": "blip_caption"}, "eval": None},
    }
    visual, text = load_preprocess(config)
    image = Image.new("RGB", (60, 40))
    assert visual["eval"](image).shape == (3, 48, 48) and visual["train"](image) is image
    assert text["train"]("A Dog.") == "a dog" and text["eval"]("A Dog.") == "A Dog."
    with pytest.raises(EVLGenError, match="blip_image_eval"):
        load_preprocess({"vis_processor": {"eval": {"name": "blip_image_evil"}}})
    with pytest.raises(ConfigError, match="vis_processor: must be a mapping"):
        load_preprocess({"vis_processor": ["blip_image_eval"]})
    with pytest.raises(ConfigError, match="load_preprocess takes a model, or a section .* not NoneType"):
        load_preprocess(None)


def test_features_and_matching_under_laviss_names():
    image = Image.new("RGB", (64, 64), "red")
    samples, found = None, {}
    for name in ("blip2_feature_extractor", "blip2_image_text_matching"):
        torch.manual_seed(0)
        model, visual, text = load_model_and_preprocess(name, "shapes")
        samples = {"image": visual["eval"](image)[None], "text_input": [text["eval"]("a red square")]}
        features = model.extract_features(samples, mode="image")
        assert features.image_embeds_proj is features["image_embeds_proj"]
        assert features.image_embeds.shape[:2] == features.image_embeds_proj.shape[:2]
        assert model.extract_features(samples).multimodal_embeds.ndim == 3
        with pytest.raises(AttributeError, match="image_embeds"):
            features.text_embeds  # noqa: B018
        found[name] = model
    assert type(found["blip2_feature_extractor"]) is Blip2Stage1
    matcher = found["blip2_image_text_matching"]
    for head, size in (("itm", 2), ("itc", 1)):
        assert torch.equal(matcher(samples, match_head=head), matcher.match(samples, head))
        assert matcher(samples, match_head=head).shape == (1, size)
    with pytest.raises(ConfigError, match="Train model.arch: blip2"):
        matcher.train()(samples)


@pytest.mark.parametrize("name", ["blip2", "blip2_feature_extractor", "blip2_image_text_matching"])
def test_types_of_the_first_stage(name):
    """lavis/configs/models/blip2/blip2_{pretrain,pretrain_vitL,coco}.yaml."""
    cfg = load_model_config(name, "coco")
    assert (cfg.checkpoint, cfg.vision.image_size) == (f"{LAVIS}blip2_finetune_coco.pth", 364)
    assert (cfg.vision.freeze, cfg.vision.precision, cfg.vision.grad_checkpoint) == (False, "fp32", True)
    cfg = load_model_config(name, "pretrain_vitL")
    assert (cfg.checkpoint, cfg.vision.name) == (f"{LAVIS}blip2_pretrained_vitL.pth", "clip_L")
    assert load_model_config(name, "pretrain").checkpoint == f"{LAVIS}blip2_pretrained.pth"


def test_the_task_video_text_pretrain_trains_and_scores_nothing(tmp_path):
    path = tmp_path / "video.yaml"
    path.write_text(
        "model: {arch: evlgen_video_opt, model_type: shapes, checkpoint: null}\n"
        "datasets: {shapes_video_caption: {train_size: 4}}\n"
        "run: {task: video_text_pretrain, max_iters: 1, batch_size_train: 2, num_workers: 0,\n"
        f"  tensorboard: false, output_dir: {tmp_path / 'output'}}}\n"
    )
    cfg = Config.load(path)
    assert cfg.run.valid_splits == [] and run(cfg) == {}
    assert (tmp_path / "output/latest/checkpoints/latest/model.safetensors").is_file()

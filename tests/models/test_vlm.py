"""Frozen parts, precision, prompts, saving and loading of whole models."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from evlgen.common.errors import CheckpointError, ConfigError, DataError
from evlgen.common.registry import registry


@pytest.fixture
def build(golden):
    """Builds the golden model with changes to its parts: ``build(language={"precision": "bf16"})``."""
    from omegaconf import OmegaConf

    def make(**changes):
        from evlgen.config.config import load_model_file

        cfg = load_model_file(golden / "evlgen_opt" / "model.yaml")
        return registry.get_model_class("evlgen_opt").from_config(
            OmegaConf.merge(cfg, OmegaConf.create(changes))
        )

    return make


@pytest.fixture
def samples(golden):
    image = load_file(golden / "evlgen_opt" / "expected.safetensors")["image"]
    return {"image": image, "text_input": ["a red circle", "two blue stars on a hill", "a cat"]}


def test_frozen_parts_have_no_gradients_and_stay_in_eval_mode(build, samples):
    model = build().train()
    assert model.training and model.connector.training
    assert not any(m.training for part in (model.vision, model.language) for m in part.modules())
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(samples)["loss"].backward()
    optimizer.step()
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"ln_vision", "connector"}
    assert all(p.grad is None for part in (model.vision, model.language) for p in part.parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_freezing_decides_what_a_checkpoint_holds(build, freeze):
    names = build(vision={"freeze": freeze}, language={"freeze": True}).trained_state_dict()
    assert any(n.startswith("vision.") for n in names) is not freeze
    assert not any(n.startswith("language.") for n in names)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_frozen_weights_are_kept_in_the_configured_precision(build, samples, precision):
    model = build(vision={"precision": precision}, language={"precision": precision})
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert {p.dtype for part in (model.vision, model.language) for p in part.parameters()} == {dtype}
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    loss = model(samples)["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.connector.proj_in.weight.grad.isfinite().all()
    reference = build()(samples)["loss"]
    assert abs(loss.item() - reference.item()) < (0.05 if precision == "bf16" else 1e-6)


def test_autocast_trains_and_generates(build, samples):
    model = build(vision={"precision": "bf16"}, language={"precision": "bf16"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(samples)["loss"]
        texts = model.generate(samples, num_beams=2, max_length=4)
    assert loss.dtype == torch.float32 and loss.isfinite() and len(texts) == 3


def test_padding_and_batch_mates_do_not_change_a_samples_loss(build, samples):
    model = build()
    single = [
        model({"image": samples["image"][i : i + 1], "text_input": [samples["text_input"][i]]})["loss"].item()
        for i in range(3)
    ]
    counts = [len(model.language.tokenizer(t + "\n").input_ids) for t in samples["text_input"]]
    expected = sum(loss * n for loss, n in zip(single, counts, strict=True)) / sum(counts)
    assert model(samples)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_cross_entropy_over_all_logits_at_the_labelled_places(build, samples):
    model = build(prompt="a photo of")
    texts = [f"a photo of {t}" for t in samples["text_input"]]
    language = model.language
    tokens = language.tokenizer([t + "\n" for t in texts], return_tensors="pt", padding=True)
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    labels[:, : len(language.tokenizer("a photo of").input_ids)] = -100
    soft = model.soft_prompts(samples)
    embeds = torch.cat([soft, language.model.get_input_embeddings()(tokens.input_ids)], dim=1)
    mask = torch.cat([torch.ones(soft.shape[:2], dtype=torch.long), tokens.attention_mask], dim=1)
    all_labels = torch.cat([torch.full(soft.shape[:2], -100), labels], dim=1)
    expected = language.model(inputs_embeds=embeds, attention_mask=mask, labels=all_labels).loss
    got = model({**samples, "text_input": texts})["loss"]
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_text_output_is_learned_and_text_input_only_read(build, samples):
    model = build()
    both = {**samples, "text_output": ["red", "two", "yes"]}
    whole = {
        **samples,
        "text_input": [f"{a} {b}" for a, b in zip(samples["text_input"], both["text_output"], strict=True)],
    }
    assert model(both)["loss"].item() != pytest.approx(model(whole)["loss"].item(), rel=1e-3)


def test_a_texts_own_loss_is_that_of_a_batch_of_it_alone_times_its_tokens(build, samples):
    model = build()
    got = model.sample_losses(samples)
    for i, text in enumerate(samples["text_input"]):
        alone = model({"image": samples["image"][i : i + 1], "text_input": [text]})
        assert got["losses"][i].item() == pytest.approx(alone["loss"].item() * alone["num_tokens"], rel=1e-5)
        assert got["num_tokens"][i] == alone["num_tokens"]


WEIGHED = {  # two texts of the first image, none of the second, three of the third
    "text_input": ["what?", "what is it?", "where?", "who?", "how many?"],
    "text_output": ["red", "a blue star", "here", "nobody", "two"],
    "num_texts": [2, 0, 3],
    "text_weights": [0.7, 0.3, 1.0, -0.5, 0.0],
}


def test_texts_that_weigh_are_each_learned_by_its_weight_and_a_batch_weighs_by_its_images(build, samples):
    model = build()
    model.language.positions_at_once = 16  # an image at a time, where that is possible
    got = model({"image": samples["image"], **WEIGHED})
    assert got["num_tokens"] == 3
    got["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows, expected = [0, 0, 2, 2, 2], 0.0
    for i, (row, weight) in enumerate(zip(rows, WEIGHED["text_weights"], strict=True)):
        one = {k: WEIGHED[k][i : i + 1] for k in ("text_input", "text_output")}
        alone = model({"image": samples["image"][row : row + 1], **one})
        loss = weight * alone["loss"] * alone["num_tokens"] / 3
        loss.backward()
        expected += loss.item()
    assert got["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert gradients
    for name, p in model.named_parameters():
        if name in gradients:
            assert torch.allclose(p.grad, gradients[name], rtol=1e-3, atol=1e-6), name


FREELY = {"use_nucleus_sampling": True, "top_p": 1.0, "top_k": None, "min_length": 0}


@pytest.mark.parametrize("prompt", ["", ["a photo of", "", "here is"]])
@torch.no_grad()
def test_losses_of_tokens_are_those_of_the_choices_that_wrote_them(build, samples, prompt):
    model = build()
    asked = {"image": samples["image"], "prompt": prompt}
    torch.manual_seed(0)
    texts = model.generate_tokens(asked, num_captions=2, max_length=5, **FREELY)
    asked |= {"text_tokens": texts, "num_texts": [2, 2, 2]}
    got = model.sample_losses(asked)
    assert got["num_tokens"].tolist() == [len(text) for text in texts]
    soft, language = model.soft_prompts(samples), model.language
    words = language.model.get_input_embeddings()
    for i, text in enumerate(texts):  # one token after the other
        read = prompt if isinstance(prompt, str) else prompt[i // 2]
        ids, loss = language.tokenizer(read).input_ids, 0.0
        for token in text:
            embeds = torch.cat([soft[i // 2 : i // 2 + 1], words(torch.tensor([ids]))], dim=1)
            loss -= language.model(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)[token].item()
            ids = [*ids, token]
        assert got["losses"][i].item() == pytest.approx(loss, rel=1e-4)
    assert model.language.texts(texts) == [
        language.tokenizer.decode([t for t in text if t not in language.end_token_ids]).strip()
        for text in texts
    ]


def test_several_texts_of_an_image_are_learned_as_if_each_had_it_alone(build, samples):
    model = build()
    texts = ["a dog", "the dog on a hill", "red", "two cats", "a cat"]
    together = model({"image": samples["image"], "text_input": texts, "num_texts": [2, 1, 2]})
    apart = model({"image": samples["image"][[0, 0, 1, 2, 2]], "text_input": texts})
    assert together["num_tokens"] == apart["num_tokens"]
    torch.testing.assert_close(together["loss"], apart["loss"], rtol=1e-5, atol=1e-6)


def test_images_read_twice_are_encoded_once_where_the_encoder_is_frozen(build, samples):
    model = build()
    assert set(model.encoded(samples)) == {"visual_tokens", "text_input"}
    assert torch.equal(model(model.encoded(samples))["loss"], model(samples)["loss"])
    learning = build(vision={"freeze": False})
    assert learning.encoded(samples) is samples


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_weights": [1.0]}, "'text_weights' has 1 values, and there are 5 texts"),
        ({"num_texts": [2, 3]}, "'num_texts' has 2 values, and there are 3 images"),
        ({"num_texts": [2, 1, 3]}, "'text_input' has 5 values, and there are 6 texts"),
        ({"text_output": ["red"]}, "'text_output' has 1 values, and there are 5 texts"),
    ],
)
def test_weights_and_texts_that_do_not_go_together_are_named(build, samples, change, message):
    with pytest.raises(DataError, match=message):
        build()({"image": samples["image"], **WEIGHED, **change})


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_captions": 2}, {"use_nucleus_sampling": True, "num_captions": 2}]
)
def test_several_captions_of_each_image(build, samples, options):
    torch.manual_seed(0)
    assert len(build().generate(samples, max_length=4, **options)) == 6


def test_prompts_of_different_lengths_give_what_each_gives_alone(build, samples):
    model = build()
    prompts = ["a", "what color is the circle", "the star"]
    together = model.generate({**samples, "prompt": prompts}, num_beams=1, max_length=5)
    alone = [
        model.generate({"image": samples["image"][i : i + 1], "prompt": p}, num_beams=1, max_length=5)[0]
        for i, p in enumerate(prompts)
    ]
    assert together == alone


def test_saved_and_loaded_models_are_equal(build, samples, tmp_path):
    model = build()
    with torch.no_grad():
        model.connector.proj_out.bias.add_(1.0)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")  # over an earlier one
    loaded = registry.get_model_class("evlgen_opt").from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(samples)["loss"], model(samples)["loss"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_saving_into_a_folder_leaves_other_files_alone(build, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    build().save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt", "model.safetensors", "config.yaml"}


@pytest.mark.parametrize("part", ["vision", "language"])
def test_parts_that_are_not_frozen_train_in_float32_and_are_saved(build, samples, tmp_path, part):
    model = build(**{part: {"freeze": False, "precision": "bf16"}}).train()
    assert {p.dtype for p in getattr(model, part).parameters()} == {torch.float32}
    model(samples)["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters())
    with torch.no_grad():
        for parameter in getattr(model, part).parameters():
            parameter.add_(0.01)
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = registry.get_model_class("evlgen_opt").from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(samples)["loss"], model(samples)["loss"])
    assert len(loaded.generate(samples, num_beams=1, max_length=3)) == 3


def test_only_a_prompt_that_is_there_is_left_unlearned(build, samples):
    without = build()(samples)["loss"].item()
    assert build(prompt="a photo of")(samples)["loss"].item() == pytest.approx(without)


def test_texts_longer_than_the_language_model_reads_are_named(build, samples):
    with pytest.raises(ConfigError, match="positions, and the language model has 128. Lower max_length"):
        build().generate(samples, num_beams=1, max_length=600)


def test_a_checkpoint_of_other_sizes_is_refused_by_name_and_shapes(build):
    with pytest.raises(CheckpointError, match=r"connector\..* has shape .*, the model's is"):
        build(connector={"hidden_size": 32})


def test_a_checkpoint_of_another_architecture_is_refused(build, tmp_path):
    save_file({"Qformer.bert.x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another architecture"):
        build(checkpoint=str(tmp_path / "other.safetensors"))


def test_a_partial_checkpoint_says_what_was_missing(build, tmp_path, caplog):
    save_file({"connector.proj_out.bias": torch.full((64,), 7.0)}, tmp_path / "part.safetensors")
    model = build()
    with caplog.at_level("WARNING"):
        report = model.load_checkpoint(tmp_path / "part.safetensors")
    assert report.loaded == ["connector.proj_out.bias"] and "ln_vision.bias" in report.missing
    assert "were not in it" in caplog.text
    assert (model.connector.proj_out.bias == 7).all()


def test_an_image_size_the_patches_do_not_divide_is_named(build):
    with pytest.raises(
        ConfigError, match="image_size 60 is no multiple of eva_clip_g's patch size 14; 56 is the nearest"
    ):
        build(vision={"image_size": 60})


def test_another_image_size_resamples_the_positions(build):
    model = build(vision={"image_size": 84})
    assert model.visual_tokens(torch.zeros(1, 3, 84, 84)).shape == (1, 37, 48)


def test_vision_weights_of_another_model_are_refused(build, tmp_path):
    save_file({"foo": torch.zeros(1)}, tmp_path / "foo.safetensors")
    with pytest.raises(CheckpointError, match="these are another model's weights"):
        build(vision={"pretrained": str(tmp_path / "foo.safetensors")})


def test_a_timm_name_that_is_not_there_names_the_nearest(build):
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224"):
        build(vision={"name": "vit_tiny_patch_16_224", "pretrained": False, "kwargs": {}}, checkpoint=None)


def test_any_timm_model_is_a_vision_encoder(build):
    model = build(
        vision={
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "image_size": 32,
            "kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        checkpoint=None,
    )
    assert model.vision.num_tokens == 17
    assert model.soft_prompts({"image": torch.zeros(2, 3, 32, 32)}).shape == (2, 8, 64)


@pytest.mark.parametrize(
    ("name", "tokens", "channels"), [("resnet18", 1, 512), ("swin_tiny_patch4_window7_224", 1, 768)]
)
def test_feature_maps_become_tokens(name, tokens, channels):
    from evlgen.models.vision import TimmEncoder

    encoder = TimmEncoder(name, image_size=32, pretrained=False).eval()
    assert (encoder.num_tokens, encoder.num_prefix_tokens, encoder.embed_dim) == (tokens, 0, channels)
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, tokens, channels)

"""Video processors: which frames, which part of them, and normalised how."""

from __future__ import annotations

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evlgen.common.errors import ConfigError, DataError
from evlgen.datasets.file_builder import FileBuilder
from evlgen.media.video import FrameList, Video
from evlgen.models.zoo import load_preprocess
from evlgen.processors import build_processor
from evlgen.processors.image import CLIP_MEAN, CLIP_STD
from evlgen.processors.randaugment import OPERATIONS
from evlgen.processors.video import head_and_tail

NAMES = ["alpro_video_train", "alpro_video_eval"]


def grey(*levels: int) -> FrameList:
    return FrameList([np.full((12, 16, 3), level, np.uint8) for level in levels])


def photo_like(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8).repeat(4, 0).repeat(4, 1)


def build(name: str, **section):
    return build_processor({"name": name, "image_size": 16, **section})


def levels(video: torch.Tensor) -> list[int]:
    """The grey levels that a video's frames had before they were normalised."""
    pixels = video[:, :, 0, 0] * torch.tensor(CLIP_STD)[:, None] + torch.tensor(CLIP_MEAN)[:, None]
    return (pixels * 255).round().int()[0].tolist()


def test_evaluation_takes_evenly_spaced_frames_and_normalises_them_with_clips_numbers():
    video = build("alpro_video_eval", n_frms=4)(grey(*range(0, 200, 20)))  # ten frames
    assert video.shape == (3, 4, 16, 16) and video.dtype == torch.float32
    assert levels(video) == [0, 40, 100, 140]  # frames 0, 2, 5 and 7
    wanted = [(100 / 255 - mean) / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)]
    torch.testing.assert_close(video[:, 2, 3, 5], torch.tensor(wanted))


def test_mean_and_std_may_be_others():
    video = build("alpro_video_eval", mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])(grey(0, 255))
    assert video[:, 0].unique().tolist() == [-1] and video[:, 1].unique().tolist() == [1]


@pytest.mark.parametrize("name", NAMES)
def test_a_short_video_repeats_frames_and_without_n_frms_all_are_taken(name):
    assert build(name, n_frms=5)(grey(10, 20)).shape == (3, 5, 16, 16)
    assert build(name)(grey(10, 20, 30)).shape == (3, 3, 16, 16)
    assert levels(build("alpro_video_eval", n_frms=5)(grey(10, 20))) == [10, 10, 10, 20, 20]


@pytest.mark.parametrize(
    ("count", "wanted", "in_head", "different"),
    [(10, 4, 2, 4), (9, 4, 2, 4), (10, 5, 2, 5), (3, 4, 2, 3), (1, 3, 0, 1), (1, 1, 0, 1)],
)
def test_head_and_tail_give_as_many_as_wanted_half_of_them_from_each_half(count, wanted, in_head, different):
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = head_and_tail(count, wanted)
        assert len(chosen) == wanted and chosen == sorted(chosen)
        assert 0 <= chosen[0] and chosen[-1] < count
        assert sum(i < count // 2 for i in chosen) == in_head and len(set(chosen)) == different


@pytest.mark.parametrize("wanted", [1, 2, 4])
def test_training_draws_any_frame_of_the_video(wanted):
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        seen.update(head_and_tail(8, wanted))
    assert seen == set(range(8))


def test_all_frames_of_a_video_are_cropped_mirrored_and_augmented_alike():
    processor = build("alpro_video_train", image_size=24)
    still = FrameList([photo_like()] * 3)
    outcomes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        video = processor(still)
        assert torch.equal(video[:, 0], video[:, 1]) and torch.equal(video[:, 0], video[:, 2])
        outcomes.add(video[:, 0].numpy().tobytes())
    assert len(outcomes) > 9


def test_evlgens_videos_are_not_augmented_and_laviss_always_by_two_different_operations(monkeypatch):
    """yiren-jian/EVLGen and salesforce/LAVIS, both lavis/processors/alpro_processors.py."""
    drawn: list[str] = []

    def noted(name):
        return lambda image, strength: drawn.append(name) or OPERATIONS[name](image, strength)

    monkeypatch.setattr(
        "evlgen.processors.randaugment.OPERATIONS", {name: noted(name) for name in OPERATIONS}
    )
    video, met = FrameList([photo_like(i) for i in range(2)]), set()
    for augment in ("none", "lavis", None):
        processor = build("alpro_video_train", image_size=32, **({"augment": augment} if augment else {}))
        for seed in range(60):
            torch.manual_seed(seed)
            drawn.clear()
            processor(video)
            first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]  # of the two frames
            assert first == second and len(first) == len(set(first)) == (0 if augment == "none" else 2)
            met.update(first)
    assert met == set(OPERATIONS) - {"AutoContrast"}


def test_half_of_the_videos_are_mirrored():
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 1, 3))
    processor = build("alpro_video_train")
    mirrored = 0
    for seed in range(60):
        torch.manual_seed(seed)
        video = processor(FrameList([ramp]))[0, 0]
        mirrored += bool(video[8, 2] > video[8, -3])
    assert 18 <= mirrored <= 42


def test_the_random_part_has_the_share_of_the_area_that_was_asked_for():
    processor = build("alpro_video_train", image_size=100, min_scale=0.5, max_scale=0.6)
    for seed in range(30):
        torch.manual_seed(seed)
        left, top, right, bottom = processor._random_box()
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert 0.48 <= (right - left) * (bottom - top) <= 0.62


def test_random_choices_come_from_torch_alone():
    processor, video = build("alpro_video_train", n_frms=4), FrameList([photo_like(i) for i in range(8)])
    torch.manual_seed(3)
    first = processor(video)
    random.seed(1), np.random.seed(1)
    torch.manual_seed(3)
    assert torch.equal(processor(video), first)
    torch.manual_seed(4)
    assert not torch.equal(processor(video), first)


def test_a_path_and_a_video_are_read_alike(shared):
    path = shared / "data/broken/four_frames.mov"
    processor = build("alpro_video_eval", n_frms=2)
    assert torch.equal(processor(str(path)), processor(Video(path)))
    assert torch.equal(processor(path), processor(FrameList(Video(path).read(range(4)))))


def test_anything_else_is_named_with_the_remedy():
    with pytest.raises(DataError, match=r"got Tensor.*FrameList\(frames\)"):
        build("alpro_video_eval")(torch.zeros(3, 4, 4))


def test_scales_that_no_part_can_have_are_named():
    with pytest.raises(ConfigError, match="min_scale 0.9 and max_scale 0.5"):
        build("alpro_video_train", min_scale=0.9, max_scale=0.5)
    with pytest.raises(ConfigError, match="n_frms"):
        build("alpro_video_eval", n_frms=0)


@pytest.mark.parametrize("name", NAMES)
def test_processors_can_be_sent_to_spawned_workers(name):
    processor = build(name, n_frms=2)
    torch.manual_seed(0)
    wanted = processor(grey(1, 2, 3))
    torch.manual_seed(0)
    assert torch.equal(pickle.loads(pickle.dumps(processor))(grey(1, 2, 3)), wanted)


@pytest.mark.parametrize(
    ("temporal", "names"),
    [(None, ["blip2_image_train", "blip_image_eval"]), (object(), NAMES)],
    ids=["pictures", "clips"],
)
def test_a_model_comes_with_the_processors_of_what_it_reads(temporal, names):
    vision = SimpleNamespace(image_size=32, image_mean=(0.5, 0.4, 0.3), image_std=(0.1, 0.2, 0.3))
    visual, _ = load_preprocess(SimpleNamespace(vision=vision, temporal=temporal))
    sections = [visual["train"].section, visual["eval"].section]
    assert [section["name"] for section in sections] == names
    assert all(section["image_size"] == 32 and section["mean"] == [0.5, 0.4, 0.3] for section in sections)
    assert [section.get("n_frms") for section in sections] == ([4, 4] if temporal else [None, None])


def test_the_yaml_of_a_dataset_chooses_the_reader(tmp_path):
    info = {"annotations": {"train": {"storage": "a.json"}}, "videos": {"storage": "clips"}}
    builder = FileBuilder("mine", tmp_path, {}, {}, info, data_type="videos", video_reader="decord")
    assert builder.media().open("x.mp4").reader == "decord"

"""Samples, skipped samples and batches of the dataset contract."""

from __future__ import annotations

import pickle

import pytest
import torch

from evlgen.common.errors import DataError
from evlgen.datasets import BaseDataset, Skipped


class EveryThirdIsBroken(BaseDataset):
    def load_sample(self, index: int) -> dict:
        if index % 3 == 0:
            raise DataError("broken on purpose")
        if index == 7:
            raise OSError("disk gone")
        return {"image": torch.full((3, 2, 2), float(self.records[index])), "text_input": f"number {index}"}


@pytest.fixture
def dataset() -> BaseDataset:
    return EveryThirdIsBroken(list(range(10)))


def test_broken_samples_stay_in_their_own_place(dataset) -> None:
    samples = [dataset[i] for i in range(len(dataset))]
    assert [isinstance(s, Skipped) for s in samples] == [i % 3 == 0 or i == 7 for i in range(10)]
    assert samples[3] == Skipped(index=3, id="3", reason="broken on purpose")
    assert samples[7].reason == "disk gone"
    assert all(s["image"].unique().item() == i for i, s in enumerate(samples) if isinstance(s, dict))


def test_batch_stacks_tensors_and_lists_the_rest(dataset) -> None:
    batch = dataset.collater([dataset[i] for i in range(6)])
    assert batch["image"].shape == (4, 3, 2, 2)
    assert batch["text_input"] == ["number 1", "number 2", "number 4", "number 5"]
    assert [s.index for s in batch["skipped"]] == [0, 3]


def test_batch_without_broken_samples_has_an_empty_list_of_them(dataset) -> None:
    assert dataset.collater([dataset[1]])["skipped"] == []


def test_batch_of_broken_samples_has_nothing_else(dataset) -> None:
    batch = dataset.collater([dataset[0], dataset[3]])
    assert list(batch) == ["skipped"] and len(batch["skipped"]) == 2


def test_samples_of_different_shapes_are_named() -> None:
    samples = [{"image": torch.zeros(3, 2, 2)}, {"image": torch.zeros(3, 2, 4)}]
    with pytest.raises(DataError, match=r"'image'.*\(3, 2, 2\), \(3, 2, 4\)"):
        EveryThirdIsBroken([0]).collater(samples)


def test_samples_of_different_keys_are_named() -> None:
    caption = {"text_input": "a dog", "image_id": 1, "dataset": "captions"}
    question = {"text_input": "what?", "text_output": "a dog", "question_id": 1, "dataset": "questions"}
    for samples in ([caption, caption, question], [question, caption]):
        with pytest.raises(DataError, match="different keys.*dataset 'captions'") as error:
            EveryThirdIsBroken([0]).collater(samples)
        assert "question_id, text_output (dataset 'questions')" in str(error.value)


def test_in_a_loaders_process_a_batch_is_made_in_memory_that_others_read(dataset) -> None:
    def look(samples):
        batch = dataset.collater(samples)
        return batch["image"].is_shared(), batch["image"]

    loader = torch.utils.data.DataLoader(
        dataset, batch_size=5, num_workers=1, collate_fn=look, multiprocessing_context="fork"
    )
    for number, (is_shared, image) in enumerate(loader):
        assert is_shared
        own = [dataset[i] for i in range(5 * number, 5 * number + 5)]
        assert torch.equal(image, torch.stack([s["image"] for s in own if isinstance(s, dict)]))


def test_tensors_of_different_types_become_the_wider_one(dataset) -> None:
    samples = [{"x": torch.tensor([1])}, {"x": torch.tensor([0.5])}]
    assert dataset.collater(samples)["x"].tolist() == [[1.0], [0.5]]


def test_skipped_samples_travel_between_processes(dataset) -> None:
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=5, num_workers=1, collate_fn=dataset.collater, multiprocessing_context="fork"
    )
    assert [s.index for batch in loader for s in batch["skipped"]] == [0, 3, 6, 7, 9]
    assert pickle.loads(pickle.dumps(dataset[0])) == dataset[0]


def test_an_error_in_the_code_is_not_taken_for_broken_data() -> None:
    class Faulty(BaseDataset):
        def load_sample(self, index: int) -> dict:
            return {}["image"]

    with pytest.raises(KeyError):
        Faulty([0])[0]


def test_dataset_without_records_is_refused() -> None:
    with pytest.raises(DataError, match="EveryThirdIsBroken has no records"):
        EveryThirdIsBroken([])


def test_the_earlier_name_of_a_datasets_image_works_both_ways():
    class Earlier(BaseDataset):
        def picture(self, index):
            return f"drawn {index}"

    class Now(BaseDataset):
        def image(self, index):
            return f"drawn {index}"

    assert [dataset.image(1) for dataset in (Earlier([0]), Now([0]))] == ["drawn 1"] * 2
    assert [dataset.picture(1) for dataset in (Earlier([0]), Now([0]))] == ["drawn 1"] * 2

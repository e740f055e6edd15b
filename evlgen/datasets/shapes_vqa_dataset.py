"""The Shapes world as a dataset of questions: every image is drawn when it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from evlgen.common.registry import registry
from evlgen.datasets.base_builder import role_of
from evlgen.datasets.base_dataset import BaseDataset, about_positions
from evlgen.datasets.shapes.questions import ANSWERS, Question, question
from evlgen.datasets.shapes.world import draw
from evlgen.datasets.shapes_dataset import ShapesCaptionBuilder
from evlgen.processors.base_processor import BaseProcessor

PEOPLE = 10  # VQA's accuracy is of ten people's answers; here all give the same
# As VQA publishes people's answers: digits, no articles. Its accuracy puts a model's answer into that form,
# and leaves those of people who all agree as they are.
_AS_PUBLISHED = {"one": "1", "two": "2", "three": "3", "in the middle": "in middle"}


class ShapesQuestionDataset(BaseDataset):
    """One sample per question: ``image`` float32 [3, H, W], ``text_input`` (the question), ``question_id``
    (its number), ``instance_id``; in training also ``text_output`` (the answer), else ``image_id`` (the
    scene's index).

    Args:
        split: train, val or test.
        size: how many questions.
        seed: of the world; another seed gives other scenes and questions.
        vis_processor: Pillow image -> tensor.
        text_processor: question -> the question as the model is asked it.
        learned: whether the answers are to be learned.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int,
        vis_processor: BaseProcessor,
        text_processor: BaseProcessor,
        learned: bool,
    ) -> None:
        super().__init__(range(size), vis_processor, text_processor)
        self.split = split
        self.seed = seed
        self.learned = learned

    def load_visual(self, index: int) -> torch.Tensor:
        return self.vis_processor(self.image(index))

    def load_text(self, index: int) -> dict[str, Any]:
        asked = self._question(index)
        return {
            "text_input": self.text_processor(asked.text),
            **({"text_output": asked.answer} if self.learned else {"image_id": asked.scene.index}),
            "question_id": self.records[index],
            "instance_id": str(index),
        }

    def visual_source(self, index: int) -> str:
        return f"shapes/{self.seed}/{self.split}/{self._question(index).scene.index}"

    def size(self, index: int) -> int:
        """See `MediaDataset.size`."""
        asked = self._question(index)
        return about_positions(asked.text, asked.answer)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(draw(self._question(index).scene))

    def answers(self) -> dict[int | str, list[str]]:
        """Ten equal answers to each question, as VQA writes them: ``2``, ``in middle``."""
        found = {i: self._question(i).answer for i in self.records}
        return {i: [_AS_PUBLISHED.get(answer, answer)] * PEOPLE for i, answer in found.items()}

    def answer_types(self) -> dict[int | str, str]:
        """The kinds of question: ``number``, ``colour``, ``shape``, ``size``, ``place``, ``presence``,
        ``relation``."""
        return {i: self._question(i).kind for i in self.records}

    def answer_list(self) -> list[str]:
        return list(ANSWERS)

    def _question(self, index: int) -> Question:
        return question(self.split, self.records[index], self.seed)


@registry.register_builder("shapes_vqa")
class ShapesVQABuilder(ShapesCaptionBuilder):
    """Questions about scenes of the Shapes world. Nothing is read from disk, so nothing can be missing."""

    DEFAULT_CONFIG = "configs/datasets/shapes_vqa.yaml"

    def build_split(self, split: str) -> ShapesQuestionDataset:
        return ShapesQuestionDataset(
            split,
            self.sizes[split],
            self.seed,
            self.vis_processor(split),
            self.text_processor(split),
            learned=role_of(split) == "train",
        )

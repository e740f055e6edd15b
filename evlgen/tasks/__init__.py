"""Tasks: what is trained and how it is scored. Importing this package registers the built-in ones."""

from evlgen.tasks.base_task import BaseTask
from evlgen.tasks.captioning import CaptioningTask
from evlgen.tasks.captioning_scst import SelfCriticalCaptioningTask
from evlgen.tasks.pretrain import ImageTextPretrainTask

__all__ = ["BaseTask", "CaptioningTask", "ImageTextPretrainTask", "SelfCriticalCaptioningTask"]

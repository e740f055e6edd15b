"""Tasks: what is trained and how it is scored. Importing this package registers the built-in ones."""

from evlgen.tasks.base_task import BaseTask
from evlgen.tasks.captioning import CaptioningTask
from evlgen.tasks.captioning_scst import SelfCriticalCaptioningTask
from evlgen.tasks.conversation import ConversationTask
from evlgen.tasks.pretrain import ImageTextPretrainTask
from evlgen.tasks.question_answering import QuestionAnsweringTask
from evlgen.tasks.retrieval import RetrievalTask
from evlgen.tasks.vqa import AOKVQATask, GQATask, VideoQATask, VQATask

__all__ = [
    "AOKVQATask",
    "BaseTask",
    "CaptioningTask",
    "ConversationTask",
    "GQATask",
    "ImageTextPretrainTask",
    "QuestionAnsweringTask",
    "RetrievalTask",
    "SelfCriticalCaptioningTask",
    "VQATask",
    "VideoQATask",
]

"""What the tasks of this folder take from a row of ``table.parquet``."""

from lmms_eval.tasks.flickr30k.utils import flickr_cider as cider  # noqa: F401
from lmms_eval.tasks.flickr30k.utils import flickr_process_result


def visual(row):
    return [row["image"].convert("RGB")]


def caption(row, results):
    return {"CIDEr": flickr_process_result(row, results)["flickr_CIDEr"]}

"""Evaluate what a project file describes: ``python evaluate.py --cfg-path
projects/evlgen/coco_eval.yaml``."""

import sys

from evlgen.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())

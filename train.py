"""Train what a project file describes: ``python train.py --cfg-path projects/shapes/caption.yaml``."""

import sys

from evlgen.cli import train

if __name__ == "__main__":
    sys.exit(train())

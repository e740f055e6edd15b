"""``python -m evlgen``."""

import sys

from evlgen.cli import main

sys.exit(main())

"""Tests leave the user's own folders alone."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub.constants
import matplotlib

from evlgen.files.io import cache_root


def test_caches_of_this_package_and_of_libraries_are_temporary_folders():
    folders = [cache_root(), matplotlib.get_cachedir(), huggingface_hub.constants.HF_HOME]
    for folder in folders:
        assert Path(folder).is_relative_to(os.environ["XDG_CACHE_HOME"])
        assert not Path(folder).is_relative_to(Path.home() / ".cache")

"""Damaged and hostile files by the thousand: only our own errors come out, within time and memory bounds.

``tests/common/test_fuzz.py`` runs a few hundred of each kind; ``bash run_scripts/fuzz.sh`` runs 20,000.
"""

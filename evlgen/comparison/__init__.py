"""Configurations trained side by side: under the same budget, seeds, data order and evaluation.

``plan``: what is to run; ``execution``: child processes that run it; ``run_recorder``: what those note;
``results``: what came of it, as numbers; ``plots`` and ``page``: the report.
"""

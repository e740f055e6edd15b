"""What came of a run, as one HTML page that needs nothing else.

``run_folder``: what a run left on disk; ``run_page``: its page, and that of several runs beside each other;
``page``: templates and what all pages share; ``plots``: how figures look; ``metrics``: which numbers are
metrics.
"""

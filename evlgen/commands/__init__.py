"""The commands of ``python -m evlgen``, one file each: ``HELP``, ``add_arguments(parser)``, ``run(args)``.

Importing them costs nothing heavy: what a command needs it imports when it runs.
"""

#: In the order in which ``--help`` shows them.
COMMANDS = (
    "models",
    "caption",
    "index",
    "search",
    "chat",
    "serve",
    "demo",
    "visualize",
    "push",
    "convert",
    "estimate",
    "compare",
    "sweep",
    "report",
    "data",
    "download",
)

"""Names of numbers in ``log.jsonl`` that other parts read. Importing this costs nothing."""

#: What is logged of an evaluation besides its metrics; see `evlgen.runners.image_use`.
IMAGE_USE = ("eval_loss", "exchanged_loss", "image_worth", "common_fraction", "train_loss")

"""The Shapes world: small images of coloured shapes, drawn in memory, with captions, questions and a
caption checker."""

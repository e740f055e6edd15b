"""The Shapes world: small pictures of coloured shapes, drawn in memory, with captions, questions and a
caption checker."""

"""The past: names and layouts of published LAVIS and EVLGen configs (`configs`) and checkpoints
(`checkpoints`), and nothing else. Importing `configs` costs nothing heavy."""

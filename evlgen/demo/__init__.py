"""A web page that shows what models do: ``python -m evlgen demo``."""

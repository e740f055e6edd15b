"""Trained models for others: a folder that stands alone, with a card, on the Hugging Face hub."""

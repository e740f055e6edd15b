"""Batches of samples from worker processes, and requests to stop meanwhile."""

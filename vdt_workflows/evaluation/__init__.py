"""Inference, scores, and what a run leaves of them."""

"""Comparisons of runs, and pages about them."""

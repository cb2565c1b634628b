"""Data sets and weights as people have them, made ready once."""

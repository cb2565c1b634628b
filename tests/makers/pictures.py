"""Makers of pictures, and of class folders of them."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_files(root, *names):
    """Make empty files and return the folder."""
    for name in names:
        file = Path(root, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return Path(root)


def make_classes(root, **counts):
    """Make class folders with empty image files and return the folder."""
    return make_files(root, *(f"{name}/{i:03d}.jpg" for name, count in counts.items() for i in range(count)))


def write_picture(path, colour="red", size=(8, 8)):
    """Write a picture of one colour, or of the pixels that are given as an array, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(colour) if isinstance(colour, np.ndarray) else Image.new("RGB", size, colour)
    picture.save(path)
    return path

"""Where the bundles lie: in a clone, beside an editable install, or inside the installed package."""

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


@cache
def find_bundles() -> Path:
    """Give the folder that holds the bundles.

    Raises:
        FileNotFoundError: if this is a part of the packages that came without them, as in a bundle's zip.
    """
    for folder in (_PACKAGE / "bundles", _PACKAGE.parent / "bundles"):
        if any(folder.glob("*_vdt_pretraining/configs/metadata.json")):
            return folder
    raise FileNotFoundError(f"{_PACKAGE}: has no bundles beside it; install vdt-bundles, or work in a clone")

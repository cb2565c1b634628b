"""Names of patients in what is prepared: pseudonyms with a key of the user's own, or their ids."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from vdt_workflows.files import write_atomic

logger = logging.getLogger(__name__)

SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # ids that may be part of a file's name
PSEUDONYM = re.compile(r"P-(\d+)")


def key_of(folder: Path) -> Path:
    """Where the key of a prepared folder is: beside it, so that who gets the folder does not get the key."""
    return folder.resolve().with_name(f"{folder.resolve().name}_patients.json")


def name_patients(ids: Iterable[str], identity: str, folder: Path, *, begun: bool) -> dict[str, str]:
    """Give the name of each patient in a folder of prepared data.

    Pseudonyms (`P-0001`, ...) are kept in the key, a JSON file that only the user may read. Further patients get
    further numbers.

    Args:
        ids: PatientID of each patient.
        identity: "pseudonym", or "keep" for the ids themselves, of which those that could lead out of a folder are "".
        folder: the prepared data.
        begun: whether the folder has patients already, so that there must be a key.

    Raises:
        ValueError: naming the key, if it is absent or damaged.
    """
    if identity == "keep":
        return {name: name if SAFE.fullmatch(name) else "" for name in ids}
    key = key_of(folder)
    known: dict[str, str] = {}
    if key.is_file() or begun:
        try:
            known = {str(name): pseudonym for pseudonym, name in json.loads(key.read_bytes()).items()}
            last = max(int(PSEUDONYM.fullmatch(pseudonym)[1]) for pseudonym in known.values())  # type: ignore[index]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{key}: the key of the patients in {folder} is absent or damaged; put it back, or name a new folder"
            ) from error
    new = sorted({*ids} - known.keys())
    known |= {name: f"P-{number:04d}" for number, name in enumerate(new, last + 1 if known else 1)}
    if new:
        content = {pseudonym: name for name, pseudonym in known.items()}
        write_atomic(key, json.dumps(content, indent=1).encode(), mode=0o600)
        logger.info("%s: who is who; keep it to yourself", key)
    return known

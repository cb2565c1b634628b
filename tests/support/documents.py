"""The documents, and what they show as code."""

import re
from pathlib import Path

from tests.support.bundle_runs import ROOT
from vdt_workflows.cli import COMMANDS, DEFAULT_KINDS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def inline(path: Path) -> list[str]:
    """The calls of scripts within sentences, without commands that are only named."""
    found = re.findall(r"`((?:python\s+(?:scripts/|-m\s+tests)|vdt\s+\w)[^`]+)`", path.read_text())
    calls = [" ".join(line.split()) for line in found]
    return [call for call in calls if call.removeprefix("vdt ") not in {*COMMANDS, *DEFAULT_KINDS}]


def commands(text: str) -> list[str]:
    """The commands of a shell text, each on one line."""
    lines = (" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]

"""Runs of bundles from other scripts, as a user would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vdt_workflows.locator import find_bundles
from vdt_workflows.report.cells import Stage


def run_bundle(bundle: str, configs: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Run a bundle's configs as a user would, in a process of its own that shows its progress.

    Raises:
        ChildProcessError: if the run fails.
    """
    stage = Stage("", tuple(f"configs/{name}.yaml" for name in configs), settings)
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", *stage.words()]
    # Threads that spin for ever while they wait would take the cores from the loader processes.
    environment = {"GOMP_SPINCOUNT": "100000", **os.environ}
    if subprocess.run(command, cwd=find_bundles() / bundle, env=environment, check=False).returncode:
        raise ChildProcessError(f"the run of bundles/{bundle} failed; its own message is above")

"""Slow tests of faults have an interpreter each.

They fork children that train, and PyTorch refuses the backward pass in a fork of a process that has made one, as
another test of the same worker may have done.
"""

import os
import subprocess
import sys

import pytest

ALONE = "VDT_FAULT_TEST"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if ALONE in os.environ or not pyfuncitem.get_closest_marker("slow"):
        return None
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        words, cwd=pyfuncitem.config.rootpath, env={**environment, ALONE: "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True

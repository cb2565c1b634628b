"""Run the quick tests with the lowest versions that pyproject.toml admits, and with the oldest and newest Python.

    make versions

uv finds the interpreters and installs the packages; its own variables, such as UV_CONSTRAINT and UV_FIND_LINKS, hold.
Nothing is installed into the environment that this runs in. Each environment is kept and brought up to date later.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

from vdt_workflows.cli import run_function

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {  # name: version of Python, and which versions of the packages uv takes
    "lowest": ("3.10", "lowest-direct"),
    "python3.10": ("3.10", "highest"),
    "python3.13": ("3.13", "highest"),
}
SHOWN = ("torch", "monai", "numpy")
logger = logging.getLogger(__name__)


def check_versions(
    output_dir: str = ".versions", only: str | None = None, uv: str = "uv", tests: str = "tests"
) -> None:
    """Make the environments, run the quick tests in each, and print a table of what passed.

    Args:
        output_dir: folder for the environments, several GB each, and `NAME.log` of each.
        only: one of the environments: lowest, python3.10 or python3.13.
        uv: the command uv.
        tests: the folder or file of the tests.

    Raises:
        FileNotFoundError: if uv is not there.
        ValueError: if there is no such environment, or if tests failed or an environment could not be made.
    """
    if shutil.which(uv) is None:
        raise FileNotFoundError(f"{uv}: no such command; pip install uv, or give --uv PATH")
    if only is not None and only not in ENVIRONMENTS:
        raise ValueError(f"only must be one of {', '.join(ENVIRONMENTS)}, got {only}")
    place = Path(output_dir).resolve()
    place.mkdir(parents=True, exist_ok=True)
    results = {name: check_environment(place, name, uv, tests) for name in ([only] if only else ENVIRONMENTS)}
    print("\n".join(f"{name:<12} {versions:<40} {result}" for name, (versions, result) in results.items()))
    if bad := [name for name, (_, result) in results.items() if " passed" not in result or " failed" in result]:
        raise ValueError(f"{', '.join(bad)}: not passed; {place} has the logs")


def check_environment(place: Path, name: str, uv: str, tests: str) -> tuple[str, str]:
    """Make one environment and run the quick tests in it; give its versions and a sentence about the result.

    Args:
        place: folder for the environment and its log.
        name: one of `ENVIRONMENTS`.
        uv: the command uv.
        tests: the folder or file of the tests.
    """
    version, resolution = ENVIRONMENTS[name]
    python = place / name / "bin" / "python"
    steps = {
        f"Python {version} is not to be had": [uv, "venv", "--quiet", "--allow-existing", "--python", version, name],
        "the packages could not be installed": [
            *(uv, "pip", "install", "--quiet", "--python", str(python), "--resolution", resolution),
            *("--extra", "dev", "-r", str(ROOT / "pyproject.toml")),
        ],
    }
    with (place / f"{name}.log").open("w") as log:
        for failure, words in steps.items():
            logger.info("%s: %s", name, " ".join(words))
            if subprocess.run(words, cwd=place, stdout=log, stderr=log, check=False).returncode:
                log.flush()
                return "", f"{failure}: {last_line(Path(log.name))}"
        shown = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {SHOWN}), sep=', ')"
        versions = subprocess.run([python, "-c", shown], capture_output=True, text=True, check=True).stdout.strip()
        words = [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "-m",
            "not slow and not gpu",
            tests,
        ]
        logger.info("%s: %s", name, versions)
        subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, check=False)
    return versions, last_line(Path(log.name))


def last_line(log: Path) -> str:
    """Give the last line of a log that says something."""
    lines = [line.strip(" =\n") for line in log.read_text(errors="replace").splitlines() if line.strip(" =")]
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    run_function(check_versions)

"""Count the lines of the repository, room by room, against their budgets.

    make budget

Lines of the files that git tracks are counted, docstrings and blanks included. What is over its budget is marked; the
command reports and never fails.
"""

import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGETS = {  # the most lines
    "Python outside tests": 16_500,
    "networks + vdt_transforms": 4_600,
    "YAML of the bundles": 2_500,
    "tests": 15_500,
}
MOST_LINES = 350  # of a Python file outside tests
MOST_FILES = 16  # Python files in a folder


def count_lines(root: Path = ROOT) -> dict[str, int]:
    """Give the number of lines of each tracked Python and YAML file, by its path in the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [name for name in listed.split("\0") if name.endswith((".py", ".yaml")) and (root / name).is_file()]
    return {path: len((root / path).read_bytes().splitlines()) for path in paths}


def sum_rooms(lines: dict[str, int]) -> Counter[str]:
    """Give the number of lines of Python in each room: a folder, or one inside `vdt_workflows`."""
    rooms: Counter[str] = Counter()
    for path, number in lines.items():
        if path.endswith(".py"):
            folders = path.split("/")[:-1]
            rooms["/".join(folders[: 2 if folders[0] == "vdt_workflows" else 1])] += number
    return rooms


def print_budget() -> None:
    """Print the lines of each room, and what is over its budget."""
    lines = count_lines()
    rooms = sum_rooms(lines)
    product = {path: number for path, number in lines.items() if path.endswith(".py") and not path.startswith("tests/")}
    folders = Counter(path.rpartition("/")[0] for path in product)
    largest, fullest = max(product, key=product.__getitem__), max(folders, key=folders.__getitem__)
    counted = {
        "Python outside tests": sum(product.values()),
        "networks + vdt_transforms": rooms["networks"] + rooms["vdt_transforms"],
        "YAML of the bundles": sum(number for path, number in lines.items() if path.startswith("bundles/")),
        "tests": rooms["tests"],
    }
    print("\n".join(f"{number:>7,}  {room}" for room, number in sorted(rooms.items())))
    for name, number, most in [
        *((name, counted[name], most) for name, most in BUDGETS.items()),
        (f"lines of the largest file, {largest}", product[largest], MOST_LINES),
        (f"Python files in the fullest folder, {fullest}", folders[fullest], MOST_FILES),
    ]:
        print(f"{number:>7,} of {most:>6,}  {name}{f': {number - most:,} over' if number > most else ''}")


if __name__ == "__main__":
    print_budget()

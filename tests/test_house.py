"""The order of the house: who imports whom, how large a room may be, what a zip carries, and what is documented."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import count
import pytest

import vdt_workflows
from tests.support.bundle_runs import ROOT
from vdt_workflows.packaging.package import LEFT_OUT

PACKAGES = ("networks", "vdt_transforms", "vdt_workflows")
GROUND = {"files", "parallel", "errors", "drawing", "overrides", "locator", "naming", "locks", "progress"}
BUNDLE_ROOMS = {"networks", "vdt_transforms", "data", "training", "evaluation"}

# Room: what it may import beside itself and, inside vdt_workflows, the ground files.
MAY_IMPORT = {
    "networks": set(),
    "vdt_transforms": set(),
    "ground": set(),
    "data": {"networks", "vdt_transforms"},
    "training": {"networks", "vdt_transforms", "data"},
    "evaluation": {"networks", "vdt_transforms", "data", "training"},
    "preparation": BUNDLE_ROOMS,
    "report": BUNDLE_ROOMS,
    "packaging": BUNDLE_ROOMS,
    "planning": BUNDLE_ROOMS | {"preparation", "report"},
    "cli": BUNDLE_ROOMS | {"preparation", "planning", "report", "packaging"},
    "__main__": {"cli"},
    "names": BUNDLE_ROOMS,  # vdt_workflows/__init__.py, which configs name and no module imports
}


def find_modules(root: Path) -> dict[str, Path]:
    """Name of each module of the packages, and its file."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def find_imports(root: Path) -> dict[str, set[str]]:
    """What each module imports of this repository, inside functions too."""
    modules = find_modules(root)
    scripts = {path.stem for path in (root / "scripts").glob("*") if path.suffix in ("", ".py")}
    ours = {*PACKAGES, "scripts", "tests", *scripts}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        found[module] = set()
        for name, names in imported(ast.parse(path.read_text()), package):
            if name.partition(".")[0] in ours:
                found[module] |= {f"{name}.{inner}" if f"{name}.{inner}" in modules else name for inner in names}
    return found


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Give each imported module with the names that are taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [""]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])]), [alias.name for alias in node.names]


def room_of(module: str) -> str:
    package, *inside = module.split(".")
    if package != "vdt_workflows":
        return package
    if not inside:
        return "names"
    return "ground" if inside[0] in GROUND else inside[0]


def find_wrong_imports(imports: dict[str, set[str]]) -> list[str]:
    """Name each import that the table does not allow."""
    wrong = []
    for module, targets in imports.items():
        room = room_of(module)
        allowed = {room} | MAY_IMPORT[room] | ({"ground"} if module.startswith("vdt_workflows") else set())
        wrong += [f"{module} imports {target}" for target in sorted(targets) if room_of(target) not in allowed]
    return wrong


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Give the modules of one circle of imports, or none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def is_left_out(module: str) -> bool:
    """Whether a bundle's zip goes without a module."""
    package, *inside = module.split(".")
    return package == "vdt_workflows" and bool(inside) and bool({inside[0], f"{inside[0]}.py"} & {*LEFT_OUT})


def find_missing_in_zips(imports: dict[str, set[str]]) -> list[str]:
    carried = {module: targets for module, targets in imports.items() if not is_left_out(module)}
    return [f"{module} needs {target}" for module in carried for target in carried[module] if is_left_out(target)]


# Imports


def test_no_room_imports_what_the_table_does_not_allow():
    assert not find_wrong_imports(find_imports(ROOT))


def test_no_modules_import_each_other_in_a_circle():
    assert not find_circle(find_imports(ROOT))


def test_no_module_that_a_zip_carries_imports_one_that_it_leaves_out():
    assert all((ROOT / "vdt_workflows" / name).exists() for name in LEFT_OUT if name != "weights")
    assert not find_missing_in_zips(find_imports(ROOT))
    assert not [module for module in vdt_workflows._MODULES.values() if is_left_out(f"vdt_workflows.{module}")]


@pytest.mark.parametrize(
    ("module", "line", "target"),
    [
        ("networks.p3d", "import vdt_transforms", "vdt_transforms"),
        ("vdt_transforms.vdt", "from networks import P3D", "networks"),
        ("vdt_workflows.files", "from .data import cache", "vdt_workflows.data.cache"),
        (
            "vdt_workflows.data.cache",
            "def load():\n    import vdt_workflows.training.runs",
            "vdt_workflows.training.runs",
        ),
        ("vdt_workflows.report.pages", "from ..preparation import lidc", "vdt_workflows.preparation.lidc"),
        ("vdt_workflows.report.rows", "from vdt_workflows.cli import main", "vdt_workflows.cli"),
        ("vdt_workflows.evaluation.outputs", "from vdt_workflows import RunLog", "vdt_workflows"),
        ("vdt_workflows.data", "from vdt_workflows.evaluation import outputs", "vdt_workflows.evaluation.outputs"),
        ("vdt_workflows.data.volumes", "import demo", "demo"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, module, line, target):
    root = plant(tmp_path, **{module: line})
    (root / "scripts").mkdir()
    (root / "scripts" / "demo.py").touch()
    assert find_wrong_imports(find_imports(root)) == [f"{module} imports {target}"]


def test_a_circle_and_a_module_that_zips_miss_are_found(tmp_path):
    lines = {
        "vdt_workflows.data.volumes": "from vdt_workflows.locator import find_bundles",
        "vdt_workflows.locator": "def f():\n    from .data import volumes",
    }
    imports = find_imports(plant(tmp_path, **lines))
    assert {*lines} == set(find_circle(imports))
    assert find_missing_in_zips(imports) == ["vdt_workflows.data.volumes needs vdt_workflows.locator"]


def plant(folder: Path, **lines: str) -> Path:
    """Write a repository of empty modules, with lines in some, by the module's name."""
    for module, path in find_modules(ROOT).items():
        file = folder / path.relative_to(ROOT)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines.pop(module, ""))
    assert not lines
    return folder


# Sizes


def test_the_budget_is_counted_from_the_files_that_git_tracks(capsys):
    count.print_budget()
    printed = capsys.readouterr().out
    lines = count.count_lines()
    assert lines["tests/test_house.py"] == len(Path(__file__).read_text().splitlines())
    rooms = count.sum_rooms(lines)
    assert {"networks", "vdt_transforms", "vdt_workflows/data", "scripts", "tests"} <= rooms.keys()
    assert sum(rooms.values()) == sum(number for path, number in lines.items() if path.endswith(".py"))
    assert f"of {count.BUDGETS['tests']:>6,}  tests" in printed


def test_no_file_is_too_long_and_no_folder_too_full():
    lines = {path: number for path, number in count.count_lines().items() if path.endswith(".py")}
    product = {path: number for path, number in lines.items() if not path.startswith("tests/")}
    assert not {path: number for path, number in product.items() if number > count.MOST_LINES}
    folders = [path.rpartition("/")[0] for path in lines]
    assert not {folder for folder in folders if folders.count(folder) > count.MOST_FILES}


# Documents and dependencies


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring_of_its_own_that_is_a_sentence(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
            first = (text or "").strip().partition("\n\n")[0]
            assert re.fullmatch(r"[A-Z0-9`].*[.:]", first, re.DOTALL), f"{package}.{name}: {first!r}"


def test_the_page_of_the_workflows_lists_the_names_of_the_package():
    text = (ROOT / "docs/reference/workflows.md").read_text()
    shown = re.findall(
        r"^::: vdt_workflows\.([\w.]+)\n +options:\n +members: \[(.*?)\]$", text, re.MULTILINE | re.DOTALL
    )
    assert {module: re.split(r",\s*", names) for module, names in shown} == vdt_workflows._NAMES


def test_no_test_skips_where_a_hard_dependency_is_absent():
    listed = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    hard = {name.replace("-", "_") for name in re.findall(r'^ +"([\w-]+)', listed, re.MULTILINE)}
    hard |= {"ignite", "PIL", "skimage", "yaml"}  # imported by other names
    assert {"torch", "monai", "pydicom", "jinja2"} <= hard
    for path in (ROOT / "tests").rglob("*.py"):
        skipped = re.findall(r"importorskip\(\s*[\"'](\w+)", path.read_text())
        assert not hard & {*skipped}, path.name

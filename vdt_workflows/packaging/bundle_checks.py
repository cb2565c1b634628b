"""The checks that `vdt check` runs on the folder of one bundle, in a separate process.

    python -I vdt_workflows/packaging/bundle_checks.py FOLDER RESULT.json

It needs nothing but MONAI and what the bundle itself imports: a packaged bundle is checked without the repository.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from pydoc import locate
from typing import Any

import monai.bundle
import torch
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator, ConfigComponent
from monai.bundle.properties import InferProperties, TrainProperties
from monai.bundle.utils import merge_kv

SCHEMA = Path(__file__).parent / "metadata_schema.json"
PACKAGES = ("networks", "vdt_transforms", "vdt_workflows")
LIMIT = 25_000_000  # bytes of a file that is not in large_files
TASKS = ("_segmentation", "_classification", "_detection")  # endings by which MONAI Label knows the kind of a model
DISTRIBUTIONS = {"ignite": "pytorch-ignite", "PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml"}
LOCATOR = ComponentLocator()  # one for all parsers, since each lists the whole of MONAI once
OPTIONAL = {"highdicom", "ray"}  # imported only by the features that need them
COMMANDS = {"run", "run_workflow", "ckpt_export", "onnx_export", "trt_export", "verify_metadata", "verify_net_in_out"}
COMMANDS |= {"download_large_files"}


class Bundle:
    """A bundle's folder: of the repository, with YAML configs, or of an unpacked zip, with JSON and its own code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.packaged = (folder / "scripts").is_dir()
        self.suffix = "json" if self.packaged else "yaml"
        self.loaded: dict[str, dict[str, Any]] = {}
        self.meta_file = folder / "configs" / "metadata.json"
        self.metadata = json.loads(self.meta_file.read_text()) if self.meta_file.is_file() else {}

    def config(self, name: str) -> str:
        """Return the path of a config."""
        return str(self.folder / "configs" / f"{name}.{self.suffix}")

    def load(self, name: str) -> dict[str, Any]:
        """Read a config once."""
        if name not in self.loaded:
            self.loaded[name] = ConfigParser.load_config_file(self.config(name))
        return self.loaded[name]

    def parser(self, *names: str) -> ConfigParser:
        """Merge config files as MONAI does; a package's configs then import their own code."""
        parser = ConfigParser({})
        parser.locator = LOCATOR
        for name in names:
            for id, value in deepcopy(self.load(name)).items():
                merge_kv(parser, id, value)
        parser["bundle_root"] = str(self.folder)
        if self.packaged:
            parser.get_parsed_content("code")
        return parser

    def code(self, name: str) -> Any:
        """Return one of the packages: a package's own copy of it."""
        return self.parser("inference").get_parsed_content(name) if self.packaged else import_module(name)

    def overlays(self) -> list[str]:
        """List the configs that are merged over `train` or `inference`."""
        found = {path.stem for path in (self.folder / "configs").glob(f"*.{self.suffix}")}
        return sorted(found - {"metadata", "train", "inference"})


def check_files(bundle: Bundle) -> Iterator[str]:
    """Check required files, sizes, and paths of one machine."""
    needed = ["LICENSE", "configs/metadata.json", "configs/logging.conf", "docs/README.md", "docs/data_license.txt"]
    for name in [*needed, bundle.config("train"), bundle.config("inference")]:
        if not (bundle.folder / name).is_file():
            yield f"{name} is missing"
    for path in sorted(bundle.folder.rglob("*")):
        place = path.relative_to(bundle.folder)
        if place.parts[0] in ("eval", "data") or (place.parts[0] == "models" and not bundle.packaged):
            continue
        if path.is_file() and path.suffix not in (".pt", ".safetensors") and path.stat().st_size > LIMIT:
            yield f"{place} has {path.stat().st_size:,} bytes; the Model Zoo takes {LIMIT:,}, or large_files.yml"
        if path.suffix in (".json", ".yaml", ".md", ".py", ".txt") and (
            found := re.search(r"/(?:home|root|Users|tmp|mnt|workspace)/[\w.]+", path.read_text())
        ):
            yield f"{place} has a path of one machine: {found[0]}"
    large = bundle.folder / "large_files.yml"
    if large.is_file():
        for entry in ConfigParser.load_config_file(str(large))["large_files"]:
            if missing := {"path", "url", "hash_val", "hash_type"} - set(entry):
                yield f"large_files.yml: {entry.get('path')} lacks {', '.join(sorted(missing))}"


def check_metadata(bundle: Bundle) -> Iterator[str]:
    """Check the schema, the version, and what else the Model Zoo and MONAI Label read."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(SCHEMA, folder)  # a file that is there is not downloaded
        monai.bundle.verify_metadata(meta_file=str(bundle.meta_file), filepath=copy)
    meta = bundle.metadata
    if meta["version"] not in meta["changelog"]:
        yield f"metadata.json: the changelog has no entry {meta['version']}"
    if not meta.get("name"):
        yield "metadata.json: no name to show"
    form = meta["network_data_format"]
    if next(iter(form["inputs"])) != "image" or next(iter(form["outputs"])) != "pred":
        yield "metadata.json: MONAI Label takes the first input and output, which must be image and pred"
    pred = form["outputs"]["pred"]
    names = bundle.load("inference").get("label_names") or bundle.load("inference").get("class_names")
    if names and pred["channel_def"] != {str(i): name for i, name in enumerate(names)}:
        yield f"metadata.json: channel_def {pred['channel_def']} is not the config's names {names}"
    lower = [name.lower() for name in pred["channel_def"].values()]
    if len({*lower}) < len(lower):
        yield "metadata.json: two labels differ by capitals alone, which MONAI Label takes for one"
    if not bundle.name.endswith(TASKS) and "not meant for MONAI Label" not in meta.get("intended_use", ""):
        yield f"{bundle.name}: the name ends in none of {', '.join(TASKS)}, so MONAI Label takes it for a segmentation"
    listed = {*meta["required_packages_version"], "torch", "monai", "numpy"}
    if unlisted := {DISTRIBUTIONS.get(name, name) for name in third_party(bundle)} - listed - OPTIONAL:
        yield f"metadata.json: required_packages_version lacks {', '.join(sorted(unlisted))}, which the code imports"


def third_party(bundle: Bundle) -> set[str]:
    """List the distributions' top-level names that a packaged bundle's code imports."""
    found = set()
    for path in bundle.folder.glob("scripts/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"scripts"}


def check_configs(bundle: Bundle) -> Iterator[str]:
    """Check that required ids are there, and that every target can be imported."""
    for name, properties in (("train", TrainProperties), ("inference", InferProperties)):
        parser = bundle.parser(name)
        for fact in properties.values():
            if fact["required"] and fact["id"] not in parser:
                yield f"{name}: the id {fact['id']}, which MONAI asks for, is missing"
    runs = [("train",), ("inference",), *((base(bundle, name), name) for name in bundle.overlays())]
    for names in runs:
        parser = bundle.parser(*names)
        parser.parse()
        for component in parser.ref_resolver.items.values():
            target = component.resolve_module_name() if isinstance(component, ConfigComponent) else None
            if isinstance(target, str) and not target.startswith(("$", "@", "%")) and locate(target) is None:
                yield f"{' + '.join(names)}: {component.get_id()} names {target}, which cannot be imported"
    train, inference = (bundle.parser(name) for name in ("train", "inference"))
    if train["network_def"] != inference["network_def"]:
        yield "train and inference define different networks"


def base(bundle: Bundle, name: str) -> str:
    """Return the complete config that most of an overlay's ids belong to."""
    ids = {id.lstrip("+").partition("::")[0] for id in bundle.load(name)}
    return max(("train", "inference"), key=lambda base: len(ids & bundle.load(base).keys()))


def check_network(bundle: Bundle) -> Iterator[str]:
    """Check that the network has the metadata's shapes and can be exported, and that MONAI loads a package by name."""
    place = {"meta_file": str(bundle.meta_file), "config_file": bundle.config("inference")}
    monai.bundle.verify_net_in_out(net_id="network_def", device="cpu", **place)
    network = bundle.parser("inference").get_parsed_content("network_def").eval()
    weights = bundle.folder / "models" / "model.pt"
    with tempfile.TemporaryDirectory() as folder:
        if not weights.is_file() or not bundle.packaged:
            weights = Path(folder) / "model.pt"
            torch.save(network.state_dict(), weights)
        network.load_state_dict(bundle.code("networks").read_checkpoint(weights))
        exported = str(Path(folder) / "model.ts")
        monai.bundle.ckpt_export(net_id="network_def", filepath=exported, ckpt_file=str(weights), **place)
        form = bundle.metadata["network_data_format"]["inputs"]["image"]
        shape = [eval_size(size) for size in form["spatial_shape"]]
        x = torch.rand(1, form["num_channels"], *shape, generator=torch.Generator().manual_seed(0))
        scripted, _, extra = monai.data.load_net_with_metadata(exported, more_extra_files=("inference.json",))
        with torch.no_grad():
            difference = (scripted(x) - network(x)).abs().max().item()
        if difference > 1e-4:
            yield f"the exported network differs from the network by {difference:.2g}"
        if not extra["inference.json"]:
            yield "the exported network does not carry its config"
    if bundle.packaged and (bundle.folder / "models" / "model.pt").is_file():
        counted = str(bundle.load("train").get("class_names", "")).startswith("$")  # in the data, which are not here
        for kind in ("inference",) if counted else ("train", "inference"):
            where = {"bundle_dir": str(bundle.folder.parent), "workflow_type": kind, "device": "cpu"}
            loaded = monai.bundle.load(bundle.name, **where)
            if not isinstance(loaded, torch.nn.Module):
                yield f"monai.bundle.load gives {type(loaded).__name__} for {kind}, not a network"


def eval_size(size: int | str) -> int:
    """Return the smallest size that a metadata expression such as `16*n` allows."""
    return size if isinstance(size, int) else int(size.replace(" ", "").replace("*n", "").replace("*", "1"))


def check_readme(bundle: Bundle) -> Iterator[str]:
    """Check that the README's commands name files that are there, and settings that exist."""
    text = (bundle.folder / "docs" / "README.md").read_text().replace("\\\n", " ")
    code = bundle.code("vdt_workflows")
    for line in (line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()):
        if "monai.bundle" not in line:
            continue
        words = shlex.split(line)
        words = words[words.index("monai.bundle") + 1 :]
        if words[0] not in COMMANDS:
            yield f"README: monai.bundle has no command {words[0]}"
        folder = bundle.folder.parent if f"{bundle.name}/" in line else bundle.folder  # where the command is given
        for name in re.findall(r"[\w/]*configs/\w+\.\w+", line):
            if not (folder / name).is_file():
                yield f"README: {name} is not there"
        if "--args_file" in words:
            at = words.index("--args_file")
            if not (bundle.folder / words[at + 1]).is_file():
                del words[at : at + 2]
        try:
            with inside(folder):
                code.check_command_line(words)
        except ValueError as error:
            yield f"README: {error}"


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Change the working directory for a while, as `contextlib.chdir` of Python 3.11."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def check_isolation(bundle: Bundle) -> Iterator[str]:
    """Check that a package imported its own code alone."""
    if not bundle.packaged:
        return
    for name in PACKAGES:
        if name in sys.modules:
            yield f"{name} was imported from {sys.modules[name].__file__}, not from the package"
        place = getattr(sys.modules.get(f"scripts.{name}"), "__file__", None)
        if place is not None and not Path(place).is_relative_to(bundle.folder):
            yield f"scripts.{name} was imported from {place}, not from the package"


CHECKS = (check_files, check_metadata, check_configs, check_network, check_readme, check_isolation)


def find_faults(bundle: Bundle, check: Callable[[Bundle], Iterator[str]]) -> list[str]:
    """Run one check and list what is wrong as sentences; an error of the check is one of them."""
    try:
        return list(check(bundle))
    except Exception as error:  # MONAI raises anything
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return [f"{type(cause).__name__}: {cause}"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    whole = Bundle(Path(sys.argv[1]).resolve())
    found = {check.__name__.removeprefix("check_"): find_faults(whole, check) for check in CHECKS}
    Path(sys.argv[2]).write_text(json.dumps(found))  # not to stdout, where MONAI logs

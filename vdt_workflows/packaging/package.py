"""Make a bundle's folder into a zip that needs nothing of this repository.

    vdt package lits_liver_segmentation
    vdt package lits_liver_segmentation --weights bundles/lits_liver_segmentation/models/model.pt
    vdt package bcv_multiorgan_segmentation --weights hippocampus_mr_w16 --name hippocampus_mr_segmentation

The zip is as the Model Zoo and MONAI Label take it: JSON configs (`monai.bundle.load` opens no YAML), metadata,
licences, README, the weights or a `large_files.yml`, and the packages as `scripts.networks`, `scripts.vdt_transforms`
and `scripts.vdt_workflows`, since `scripts` is what MONAI Label keeps apart between bundles. The same files give the
same bytes.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from vdt_workflows.files import hash_file, remove_unfinished, write_atomic
from vdt_workflows.locator import find_bundles
from vdt_workflows.locks import hold
from vdt_workflows.packaging.description import (
    describe,
    list_packages,
    merge,
    read_object,
    read_scores,
    rename,
    write_readme,
)
from vdt_workflows.packaging.hub import make_hub_files, write_folder
from vdt_workflows.training.checkpoints import check_settings, load_weights, read_provenance
from vdt_workflows.training.initialisation import find_origins
from vdt_workflows.training.shipped import MODEL, Weights, locate_weights

ROOT = Path(__file__).resolve().parents[2]  # of the packages
# what a zip leaves out of vdt_workflows: no bundle reaches it
LEFT_OUT = ("preparation", "planning", "report", "packaging", "weights", "cli.py", "locator.py", "__main__.py")
PACKAGES = ("networks", "vdt_transforms", "vdt_workflows")
COMPLETE = ("train", "inference")  # configs that stand alone; the others are overlays
OURS = ("scratch", "vdt", "i3d", "acs", "2.5d")  # initialisations that can rest on weights of our own

# MONAI gives a config no path of its own file, and only `run` puts the bundle's folder on the search path, after
# `initialize`. So the config finds the path in its caller: a workflow, or a command that was given the file. Everywhere
# else the folder is `bundle_root`, which MONAI Label sets. Components wait for it by `_requires_`.
FIND_CODE = {
    "code_root": "$next((os.path.dirname(os.path.abspath(folder)) for call in inspect.stack(0) for folder in "
    "[str(workflow.config_root_path) for workflow in [call.frame.f_locals.get('self')] "
    "if isinstance(workflow, monai.bundle.ConfigWorkflow)] + [os.path.dirname(os.path.abspath(file)) for file in "
    "monai.utils.ensure_tuple(call.frame.f_locals.get('config_file_', ()))[:1]]), os.path.abspath(@bundle_root))",
    "code": "$[sys.path.insert(0, @code_root)] + [sys.modules.pop(name) for name in [*sys.modules] "
    "if name.partition('.')[0] == 'scripts' and os.path.join(@code_root, 'scripts') not in "
    "getattr(sys.modules.get('scripts'), '__path__', [])] and pkgutil.resolve_name",
    **{name: f"$@code('scripts.{name}')" for name in PACKAGES},
}
NEEDED = ("inspect", "os", "pkgutil", "sys")  # modules of those expressions

_IMPORT = re.compile(rf"^(\s*from )({'|'.join(PACKAGES)})(?=[ .])", re.MULTILINE)
_PATH = re.compile(rf"^({'|'.join(PACKAGES)})(\.\w+)+$")
_TEXT = re.compile(rf"({'|'.join(PACKAGES)})(\.|$)")
_NAME = re.compile(rf"(?<![\w.@:'\"])({'|'.join(PACKAGES)})(?=\.)")


def package_bundle(
    bundle: str,
    output_dir: str = "dist",
    weights: str | None = None,
    run: str | None = None,
    scores: str | None = None,
    weights_url: str | None = None,
    name: str | None = None,
    metadata: str | None = None,
    hub: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write `<output_dir>/<name>_v<version>.zip`, or the folder `<output_dir>/<name>` for a hub, and return its path.

    Args:
        bundle: a folder of `bundles/`.
        output_dir: folder for the zip.
        weights: a trained `model.pt` of this bundle, or the name of shipped weights. Without it the zip has code and
            configs alone.
        run: the `run.json` of that training; by default the one beside the weights. Its settings become the defaults
            of the configs, and the metadata follow them.
        scores: `scores.json` of an evaluation; its figures become `eval_metrics` of the metadata.
        weights_url: where the weights will be downloaded from; then the zip has a `large_files.yml` with their SHA-256
            instead of the file.
        name: of the package, that of the bundle by default; it ends as that does.
        metadata: a JSON file whose values replace those of the metadata: authors, version and its changelog, ...
        hub: a repository of Hugging Face, as OWNER/NAME; instead of the zip, a folder that an upload there takes as it
            is, with a model card, the weights as safetensors too, and the hash of each file.
        overwrite: replace a package of the same version that has other content.

    Raises:
        FileNotFoundError: if there is no such bundle or file.
        ValueError: if the weights do not fit the settings, or rest on weights of others, or an argument is wrong.
        FileExistsError: if a package of this version with other content is there and `overwrite` is off.
        ImportError: if safetensors, which a hub's folder needs, is not installed.
    """
    source, name = find_bundles() / bundle, name or bundle
    if not (source / "configs").is_dir():
        known = sorted(path.parent.name for path in find_bundles().glob("*/configs"))
        raise FileNotFoundError(f"{bundle}: no such bundle; there are {', '.join(known)}")
    given = [option for option, value in (("run", run), ("scores", scores), ("weights_url", weights_url)) if value]
    if given and not weights:
        raise ValueError(f"--{given[0]} describes weights; give --weights too")
    defaults = ConfigParser.load_config_file(str(source / "configs" / "inference.yaml"))
    settings: dict[str, Any] = {}
    files = dict(collect_code())
    origins: list[Weights] = []
    terms = (source / "docs" / "data_license.txt").read_text()
    if weights:
        weights = locate_weights(weights)
        run_file = Path(run) if run else Path(weights).parent / "run.json"
        settings, record = read_run(run_file)
        check_settings(run_file, weights)
        refuse_others(weights, record)
        load_weights(ConfigParser({**defaults, **settings}).get_parsed_content("network_def"), weights)  # if they fit
        files["models/run.json"] = to_json(settings)
        files.update(describe_weights_file(Path(weights), weights_url))
        terms = terms.replace("No data and no weights are", "Weights, but no data, are")
        origins = find_origins(weights)
        for origin in origins:
            card = f"docs/weights/{origin.folder.name}.md"
            files[card] = origin.text.encode()
            terms += f"\nFor the weights {origin.license} holds, and the terms of the data that {card} names.\n"
    files |= {file: (source / file).read_bytes() for file in ("LICENSE", "configs/logging.conf")}
    files["docs/data_license.txt"] = terms.encode()
    for config, content in convert_configs(source, settings).items():
        files[f"configs/{config}.json"] = to_json(content)
    meta = describe(json.loads((source / "configs" / "metadata.json").read_text()), settings, defaults)
    if name != bundle:
        rename(meta, bundle, name)
    if origins and weights and origins[0].sha256[MODEL] == hash_file(weights):
        merge(meta, origins[0].metadata)
    if scores and weights:
        meta["eval_metrics"] = read_scores(Path(scores), weights)
    if metadata:
        merge(meta, read_object(Path(metadata), "--metadata, an object as metadata.json"))
    title = meta["name"] if name != bundle else ""
    files["docs/README.md"] = write_readme(source, bool(weights), weights_url, name, title).encode()
    files["docs/requirements.txt"] = list_packages(meta).encode()
    files["configs/metadata.json"] = to_json(meta)
    if hub is not None:
        return write_folder(Path(output_dir, name), make_hub_files(hub, name, files, meta, weights, origins), overwrite)
    target = Path(output_dir) / f"{name}_v{meta['version']}.zip"
    content = make_zip(name, files)
    if target.exists() and target.read_bytes() != content and not overwrite:
        raise FileExistsError(
            f"{target}: there is another package of version {meta['version']}; raise the version in metadata.json,"
            " or give --overwrite"
        )
    with hold(output_dir):
        remove_unfinished(Path(output_dir))  # what an earlier call that was killed left
        write_atomic(target, content)
    return str(target)


@cache
def collect_code() -> dict[str, bytes]:
    """Copy the packages, as parts of one package `scripts`."""
    files = {"scripts/__init__.py": b'"""The bundle\'s own copy of the packages that its configs name."""\n'}
    for path in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        place = path.relative_to(ROOT)
        if place.parts[1] not in LEFT_OUT:
            files[f"scripts/{place.as_posix()}"] = vendor_source(path.read_text(), place.as_posix()).encode()
    return files


def vendor_source(source: str, place: str) -> str:
    """Rewrite a module's imports of the packages to imports from `scripts`.

    Raises:
        ValueError: naming the line, if the module imports one of the packages in another way than `from ... import`,
            or by a name in quotes.
    """
    changed = _IMPORT.sub(r"\1scripts.\2", source)
    for node in ast.walk(ast.parse(changed)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        line = getattr(node, "lineno", 0)
        if any(name.partition(".")[0] in PACKAGES for name in names):
            raise ValueError(f"{place}, line {line}: write `from ... import` for a package that is copied")
        named = list(ast.walk(node)) if isinstance(node, ast.Call) and "import" in ast.unparse(node.func) else []
        if any(isinstance(part, ast.Constant) and _TEXT.match(str(part.value)) for part in named):
            raise ValueError(f"{place}, line {line}: import by `__name__`; a copied package has another name")
    return changed


def convert_configs(bundle: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the YAML configs, with a run's settings as their defaults and their code in `scripts`."""
    configs = {path.stem: ConfigParser.load_config_file(str(path)) for path in (bundle / "configs").glob("*.yaml")}
    base, protocol = configs["train"], settings.get("protocol")
    if protocol in configs and protocol != base.get("protocol"):
        parser = ConfigParser(base)
        parser.update({id: value for id, value in configs[protocol].items() if id != "protocol"})
        base = configs["train"] = parser.get()
    for config in (configs[name] for name in COMPLETE):
        for id, value in settings.items():
            derived = config is base and str(config.get(id)).startswith("$")  # counted from the data in training
            if id in config and not derived:
                config[id] = value
    return {name: vendor_config(config, complete=name in COMPLETE) for name, config in sorted(configs.items())}


def vendor_config(config: Any, *, complete: bool) -> dict[str, Any]:
    """Point a config's targets and expressions to the code in `scripts`."""
    out = _vendor(config)
    key = "imports" if complete else "+imports"
    imports = [line for line in out.pop(key, []) if line.removeprefix("$import ") not in PACKAGES]
    if complete:
        imports = sorted({*imports, *(f"$import {name}" for name in NEEDED)})
        return {key: imports, "bundle_root": out.pop("bundle_root"), **FIND_CODE, **out}
    return {key: imports, **out} if imports else out


def _vendor(value: Any) -> Any:
    if isinstance(value, dict):
        out = {name: _vendor(inner) for name, inner in value.items()}
        if any(isinstance(inner, str) and _PATH.match(inner) for inner in value.values()):
            out["_requires_"] = "@code"
        return out
    if isinstance(value, list):
        return [_vendor(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith("$"):
        return _NAME.sub(r"@\1", value)
    return f"scripts.{value}" if _PATH.match(value) else value


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a run's settings and its record.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not what training writes.
    """
    settings = read_object(path, "--run, the run.json that training wrote beside the weights")
    if "_run_" not in settings:
        raise ValueError(f"{path}: not the record of a run; give the run.json that training wrote")
    record = settings.pop("_run_")
    return settings, record


def refuse_others(weights: str, record: Mapping[str, Any]) -> None:
    """Refuse weights that are, or started from, files that other people published: those may not be passed on.

    Raises:
        ValueError: naming what they rest on.
    """
    provenance: dict[str, Any] | None = read_provenance(weights)
    if not provenance:
        raise ValueError(f"{weights}: says nothing of its origin; only what these bundles' training wrote is packaged")
    while provenance:
        for origin in (provenance, record):
            if (init := origin.get("init", "scratch")) not in OURS:
                raise ValueError(f"{weights}: started from published weights of others (init {init!r}); not packaged")
        pretrained, record = provenance.get("pretrained"), {}
        if pretrained and not pretrained["provenance"]:
            raise ValueError(
                f"{weights}: started from {pretrained['file']} (SHA-256 {pretrained['sha256'][:12]}...), which these"
                " bundles did not write; weights that rest on those of others are not packaged"
            )
        provenance = pretrained and pretrained["provenance"]


def describe_weights_file(weights: Path, url: str | None) -> dict[str, bytes]:
    """Return the file itself, or the `large_files.yml` with its address and hash."""
    if url is None:
        return {"models/model.pt": weights.read_bytes()}
    entry = {"path": "models/model.pt", "url": url, "hash_val": hash_file(weights), "hash_type": "sha256"}
    return {"large_files.yml": yaml.safe_dump({"large_files": [entry]}, sort_keys=False).encode()}


def to_json(content: Any) -> bytes:
    """Write JSON as the Model Zoo keeps it."""
    return (json.dumps(content, indent=4) + "\n").encode()


def make_zip(name: str, files: Mapping[str, bytes]) -> bytes:
    """Pack files into a folder of a zip: sorted, of one time and permission, and stored, so that no zlib matters."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(f"{name}/{path}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[path])
    return buffer.getvalue()

"""Short lines for what the bundles do: use trained weights, score them, and pre-train.

    vdt segment CT -o results --weights mine_run
    vdt segment CT -o results --weights bundles/lits_liver_segmentation/models --series 2
    vdt segment MR -o results --weights hippocampus_mr_w16 --statistics --page
    vdt classify SCAN --positions nodules.csv --weights lung_nodule_malignancy_w16
    vdt detect SCAN --weights bundles/deeplesion_lesion_detection/models
    vdt evaluate mine_run PREPARED --part test
    vdt pretrain IMAGES -o encoder

The line of `python -m monai.bundle run` that it stands for is printed, and can be given by hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdt_workflows.files import read_json
from vdt_workflows.locator import find_bundles
from vdt_workflows.planning.lines import config_words, make_page, run_line, setting_words
from vdt_workflows.progress import say
from vdt_workflows.training.shipped import MODEL, RECORD, find_weights, list_weights

ORGANS, NODULES, MALIGNANCY, LESIONS, PRETRAINING = (
    "bcv_multiorgan_segmentation",
    "lidc_nodule_segmentation",
    "lidc_nodule_classification",
    "deeplesion_lesion_detection",
    "imagenet_vdt_pretraining",
)
VOLUMES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
DONE = {"segmentation": "segmented", "classification": "classified", "detection": "detected"}  # by task
WITHOUT_GPU = {  # what lets a CPU pre-train within minutes; a GPU gets the bundle's own settings
    "epochs": 30,
    "image_size": 64,
    "base_channels": 16,
    "batch_size": 32,
    "learning_rate": 0.05,
    "crop_area": [0.4, 1.0],
}


def segment(
    source: str,
    output_dir: str = "",
    weights: str = "",
    *,
    statistics: bool = False,
    page: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Segment a volume, or every volume of a folder, and tell the volumes of what was found in ml.

    Args:
        source: NIfTI, NRRD or MetaImage file, DICOM folder, zip archive, or a folder of these.
        output_dir: for NAME_seg.nii.gz and a picture of each, NAME_seg.png; by default the source's name with
            _segmented, here.
        weights: folder with the model.pt and run.json of a training, such as that of vdt train, or the name of shipped
            weights.
        statistics: write the volumes as statistics.csv too.
        page: write report.html too, with the pictures and a viewer of the first three volumes.
        settings: any setting of the bundle's inference.

    Returns:
        The folder of the results.

    Raises:
        FileNotFoundError: if there is no source, or no whole folder of weights.
        ValueError: if the weights do something else, or none are given.
        ChildProcessError: if the inference fails.
        ImportError: if a page is wanted, and ipyniivue, which has the viewer, is not installed.
    """
    if page:
        from vdt_workflows.report.viewer import find_viewer  # a second, for this alone

        find_viewer()
    more: dict[str, Any] = {"previews": True, "statistics": statistics, **settings}
    made = _apply("segmentation", "segment", source, output_dir, weights, more)
    return {**made, "page": make_page(made["folder"], 3)} if page else made


def classify(
    source: str, output_dir: str = "", positions: str = "", weights: str = "", **settings: Any
) -> dict[str, Any]:
    """Say how likely the nodules of a scan are to be malignant.

    Args:
        source: scan, as a file or a DICOM folder; without positions a cut-out nodule, or a folder of them.
        output_dir: for malignancy.csv; by default the source's name with _classified, here.
        positions: CSV of places in the scan, in mm or voxels, or a mask.
        weights: folder with the model.pt and run.json of a training, or the name of shipped weights.
        settings: any setting of the bundle's inference.

    Returns:
        The folder of the results.

    Raises:
        FileNotFoundError: if there is no source, or no whole folder of weights.
        ValueError: if the weights do something else, or none are given.
        ChildProcessError: if the inference fails.
    """
    more = {"positions": os.path.abspath(positions)} if positions else {}
    return _apply("classification", "classify", source, output_dir, weights, {**more, **settings})


def detect(source: str, output_dir: str = "", weights: str = "", **settings: Any) -> dict[str, Any]:
    """Find lesions in CT: boxes and scores, as JSON and for 3D Slicer.

    Args:
        source: CT as a file or a DICOM folder, or a folder of these.
        output_dir: by default the source's name with _detected, here.
        weights: folder with the model.pt and run.json of a training, or the name of shipped weights.
        settings: any setting of the bundle's inference.

    Returns:
        The folder of the results.

    Raises:
        FileNotFoundError: if there is no source, or no whole folder of weights.
        ValueError: if the weights do something else, or none are given.
        ChildProcessError: if the inference fails.
    """
    return _apply("detection", "detect", source, output_dir, weights, settings)


def evaluate(run: str, dataset_dir: str, output_dir: str = "", **settings: Any) -> dict[str, Any]:
    """Score trained weights on cases with labels that were held out from their training.

    Args:
        run: folder with the model.pt and run.json of a training, such as that of vdt train, or the name of shipped
            weights.
        dataset_dir: what the training was given.
        output_dir: for scores, tables and pictures; by default the run's name with _evaluated, here.
        settings: any setting of the bundle's evaluation, such as --part test.

    Returns:
        The folder of the results.

    Raises:
        FileNotFoundError: if there are no data, or no whole folder of weights.
        ChildProcessError: if the evaluation fails.
    """
    if not os.path.exists(dataset_dir):
        raise FileNotFoundError(f"{dataset_dir}: no such folder; give the data that the training was given")
    place = output_dir or f"{Path(os.path.abspath(run)).name}_evaluated"
    return _run_weights(find_model(run, "", "evaluate"), ["train"], ["evaluate"], dataset_dir, place, settings)


def pretrain(images: str, output_dir: str = "", **settings: Any) -> dict[str, Any]:
    """Pre-train an encoder on images, each read as a volume of three slices.

    With a GPU the recipe is the published one, unless settings say otherwise; without, a quarter of the width on images
    of 64 pixels.

    Args:
        images: folder with a folder of images for each class, or with train and val of such folders.
        output_dir: of the run; by default the folder's name with _encoder, here. models/encoder.pt is what --pretrained
            takes.
        settings: any setting of the bundle.

    Returns:
        The encoder's file.

    Raises:
        FileNotFoundError: if there is no such folder.
        ChildProcessError: if the training fails.
    """
    import torch  # two seconds, for this command alone

    if not os.path.isdir(images):
        raise FileNotFoundError(f"{images}: no such folder; give one with a folder of images for each class")
    bundle = find_bundles() / PRETRAINING
    target = Path(output_dir or f"{Path(os.path.abspath(images)).name}_encoder").resolve()
    places = {"bundle_root": str(bundle), "dataset_dir": os.path.abspath(images)}
    places |= {"ckpt_dir": str(target / "models"), "output_dir": str(target / "eval")}
    given = {**({} if torch.cuda.is_available() else WITHOUT_GPU), **places, **settings}
    say(f"{images}: an encoder is pre-trained on them, into {target}; the bar tells the time left")
    run_line(bundle, [*config_words(["train"]), *setting_words(given)], target)
    return {"encoder": str(target / "models" / "encoder.pt")}


def _apply(
    task: str, verb: str, source: str, output_dir: str, weights: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such file or folder; give a volume, or a folder of them")
    place = output_dir or f"{Path(os.path.abspath(source)).name.partition('.')[0]}_{DONE[task]}"
    _check_target(Path(place), Path(source))
    return _run_weights(find_model(weights, task, verb), ["inference"], [], source, place, settings)


def _check_target(target: Path, source: Path) -> None:
    """Refuse a folder of volumes that are no results: `vdt segment A*` gives a second folder as where results go."""
    if target.resolve() in (source.resolve(), source.resolve().parent) or (target / "inference.json").is_file():
        return
    names = (file.name for file in target.glob("*") if file.name.lower().endswith(VOLUMES))
    if other := next((name for name in names if "_seg." not in name), ""):
        raise ValueError(
            f"output_dir {target}: holds volumes, such as {other}, and no results; one source at a time, and results in"
            " a folder of their own (-o)"
        )


def _run_weights(
    model: tuple[Path, str], first: list[str], last: list[str], data: str, place: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Run a bundle's configs, with the overlays of the weights between the first and the last, on the data."""
    folder, name = model
    bundle, target = find_bundles() / name, Path(place).resolve()
    done = "scored" if last else DONE[name.rpartition("_")[2]]
    known = list_weights().get(folder.name)
    use = f" ({known.use})" if known and folder == known.folder else ""
    say(
        f"{data} is {done} by {folder}{use}, into {target}: some ten seconds to begin, then the bar tells the time left"
    )
    places = {"bundle_root": str(bundle), "dataset_dir": os.path.abspath(data), "output_dir": str(target)}
    given = {**places, "ckpt_path": str(folder / MODEL), **settings}
    if given.get("datalist"):
        given["datalist"] = os.path.abspath(given["datalist"])  # the bundle runs in its own folder
    names = [*first, *find_overlays(read_json(folder / RECORD)), *last]
    run_line(bundle, [*config_words(names), "--args_file", str(folder / RECORD), *setting_words(given)], target)
    return {"folder": str(target)}


def find_model(weights: str, task: str, verb: str) -> tuple[Path, str]:
    """Find a folder with `model.pt` and `run.json`, and the bundle that they belong to.

    Args:
        weights: name of shipped weights, a folder of them, that of a run, or the file itself; or empty.
        task: what they must be for, as bundles' names end.
        verb: of the command, for the messages.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the weights do something else, or none are given.
    """
    shipped = list_weights()
    fitting = [name for name, known in shipped.items() if known.bundle.endswith(task)]
    own = "--weights, the folder with model.pt and run.json of a training"
    if not weights:  # not taken unasked, even where there is one alone: it would segment anything as what it knows
        there = ", ".join(f"{name} ({shipped[name].use})" for name in fitting)
        others = f"none are shipped that {verb} (there are {', '.join(shipped) or 'none at all'}: vdt weights)"
        known = f"to {verb} there are {there}; give one's name, or" if fitting else f"{others}; give"
        raise ValueError(f"weights: {known} {own}")
    if weights in shipped:
        if weights not in fitting:
            raise ValueError(
                f"--weights {weights}: does not {verb}, it is for: {shipped[weights].use}; "
                + (f"there are {', '.join(fitting)}" if fitting else f"give {own}")
            )
        return find_weights(weights), shipped[weights].bundle
    folder = Path(weights).resolve()
    folder = folder.parent if folder.is_file() else folder
    folder = folder / "models" if (folder / "models" / MODEL).is_file() else folder
    for file in (MODEL, RECORD):
        if not (folder / file).is_file():
            known = f", or one of {', '.join(fitting)}" if fitting else ""
            raise FileNotFoundError(f"{folder / file}: no such file; give {own}{known}")
    return folder, find_bundle(folder / RECORD, task)


def find_bundle(record: Path, task: str) -> str:
    """Tell from a `run.json` which bundle's inference takes it.

    Raises:
        ValueError: if it is of another task.
    """
    settings = read_json(record)
    if {"label_names", "patch_size"} <= settings.keys():
        found = ORGANS if "stem" in settings else NODULES  # the liver's settings are some of the organs'
    else:
        marks = {"crop_size": MALIGNANCY, "pyramid_channels": LESIONS, "short_side": PRETRAINING}
        found = next((bundle for mark, bundle in marks.items() if mark in settings), "")
    if not found or not found.endswith(task):
        raise ValueError(
            f"{record}: not of a {task or 'training of a bundle'}; give the folder of a run that trained one"
        )
    return found


def find_overlays(record: Mapping[str, Any]) -> list[str]:
    """Name the configs that a network of other people's needs in inference too."""
    init = record.get("_run_", {}).get("init")
    needed = init == "genesis" or (init == "medicalnet" and record.get("depth") in (18, 34))
    return [init] if needed else []

"""`vdt segment` and `vdt classify`: the line that they stand for, and what they say where there are no weights."""

import json
import shlex
from types import SimpleNamespace

import pytest

from vdt_workflows.cli import main
from vdt_workflows.locator import find_bundles
from vdt_workflows.overrides import check_command_line
from vdt_workflows.planning import apply as module
from vdt_workflows.planning import lines as runner

ORGANS, NODULES, MALIGNANCY = module.ORGANS, module.NODULES, module.MALIGNANCY
LESIONS, PRETRAINING = module.LESIONS, module.PRETRAINING
RECORDS = {
    ORGANS: {"label_names": ["background", "a"], "patch_size": [16, 16, 16], "stem": "strided", "depth": 18},
    NODULES: {"label_names": ["background", "nodule"], "patch_size": [48, 48, 48], "depth": 18},
    MALIGNANCY: {"crop_size": 48, "class_names": ["benign", "malignant"], "depth": 18},
    LESIONS: {"depth": 18, "slices": 9, "pyramid_channels": 16},
    PRETRAINING: {"depth": 18, "image_size": 64, "short_side": 73},
}


@pytest.fixture
def lines(monkeypatch):
    """The lines that would be run, of which each setting is known to its bundle."""
    called = []

    def run(words, cwd, check):
        words = words[words.index("run") :]
        with monkeypatch.context() as here:
            here.chdir(cwd)
            check_command_line(words)
        called.append({"bundle": cwd.name, **dict(zip(words[1::2], words[2::2], strict=True))})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runner.subprocess, "run", run)
    return called


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a scan and the runs of three bundles."""
    (tmp_path / "scan.nii.gz").touch()
    for bundle, settings in RECORDS.items():
        models = tmp_path / bundle / "models"
        models.mkdir(parents=True)
        (models / "model.pt").touch()
        (models / "run.json").write_text(json.dumps({**settings, "_run_": {"init": "vdt"}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("bundle", "weights"), [(ORGANS, ""), (NODULES, "/models"), (ORGANS, "/models/model.pt")])
def test_segment_runs_the_inference_of_the_weights_bundle_with_every_further_setting(place, lines, bundle, weights):
    main(["segment", "scan.nii.gz", "-o", "out", "--weights", bundle + weights, "--largest_component", "[1]"])
    (line,) = lines
    models = place / bundle / "models"
    assert line == {
        "bundle": bundle,
        "--config_file": "['configs/inference.yaml']",
        "--args_file": str(models / "run.json"),
        "--bundle_root": str(find_bundles() / bundle),
        "--dataset_dir": str(place / "scan.nii.gz"),
        "--output_dir": str(place / "out"),
        "--ckpt_path": str(models / "model.pt"),
        "--previews": "True",
        "--statistics": "False",
        "--largest_component": "[1]",
    }


def test_a_page_without_its_viewer_is_refused_before_anything_runs(place, lines, monkeypatch):
    monkeypatch.setattr("vdt_workflows.report.viewer.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"viewer needs ipyniivue, .* there are .* vdt segment without --page"):
        main(["segment", "scan.nii.gz", "-o", "out", "--weights", ORGANS, "--page"])
    assert not lines


def test_segment_writes_statistics_and_a_page_where_they_are_wanted(place, lines, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(module, "make_page", lambda *words: made.append(words) or "the page")
    main(["segment", "scan.nii.gz", "-o", "out", "--weights", ORGANS, "--statistics", "--page"])
    assert lines[0]["--statistics"] == "True"
    assert made == [(str(place / "out"), 3)]
    assert json.loads(capsys.readouterr().out) == {"folder": str(place / "out"), "page": "the page"}


def test_classify_takes_positions_and_names_the_results_after_the_scan(place, lines, capsys):
    main(["classify", "scan.nii.gz", "--positions", "table.csv", "--weights", MALIGNANCY])
    assert (lines[0]["bundle"], lines[0]["--positions"]) == (MALIGNANCY, str(place / "table.csv"))
    assert json.loads(capsys.readouterr().out) == {"folder": str(place / "scan_classified")}


@pytest.mark.parametrize(("init", "depth", "overlays"), [("genesis", 18, ["genesis"]), ("medicalnet", 50, [])])
def test_networks_of_others_get_the_overlay_that_they_need(place, lines, init, depth, overlays):
    record = {**RECORDS[ORGANS], "depth": depth, "_run_": {"init": init}}
    (place / ORGANS / "models" / "run.json").write_text(json.dumps(record))
    main(["segment", "scan.nii.gz", "--weights", ORGANS])
    assert lines[0]["--config_file"] == str([f"configs/{name}.yaml" for name in ("inference", *overlays)])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "segment scan.nii.gz",
            r"to segment there are hippocampus_mr_w16 \(hippocampus in MR, two parts\), lung_nodule_segmentation_w16 "
            r"\(a lung nodule in the middle of a cube of CT\); give one's name, or --weights",
        ),
        ("detect scan.nii.gz", r"none are shipped that detect \(there are .*vdt_resnet3d18_w16.*\); give --weights"),
        ("segment scan.nii.gz --weights vdt_resnet3d18_w16", "does not segment, it is for: 3D encoder"),
        (f"segment scan.nii.gz --weights {MALIGNANCY}", r"run\.json: not of a segmentation; give the folder of a run"),
        (f"classify scan.nii.gz --weights {ORGANS}", r"run\.json: not of a classification"),
        ("segment scan.nii.gz --weights none", r"none/model\.pt: no such file; give --weights, the folder with model"),
        ("segment none.nii.gz", r"none\.nii\.gz: no such file or folder"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_runs(place, lines, words, sentence):
    with pytest.raises(SystemExit, match=sentence):
        main(words.split())
    assert not lines


def test_a_second_folder_of_volumes_is_not_taken_for_where_results_go(place, lines):
    for name in ("one", "two", "earlier", "results"):
        (place / name).mkdir()
    for name in ("one/a.nii.gz", "two/b.nii.gz", "earlier/a_seg.nii.gz", "results/c.nii.gz", "results/inference.json"):
        (place / name).touch()
    with pytest.raises(
        SystemExit, match=r"output_dir two: holds volumes, such as b\.nii\.gz, and no results; one source"
    ):
        main(["segment", "one", "two", "--weights", ORGANS])
    assert not lines
    for target in ("one", "earlier", "results", "new"):
        main(["segment", "one", target, "--weights", ORGANS])
    assert len(lines) == 4


@pytest.mark.parametrize(
    "weights", ["hippocampus_mr_w16", "lung_nodule_malignancy_w16", "lung_nodule_segmentation_w16"]
)
def test_shipped_weights_are_taken_by_their_name(place, lines, weights):
    known = module.list_weights()[weights]
    verb = "classify" if known.bundle == MALIGNANCY else "segment"
    main([verb, "scan.nii.gz", "--weights", weights])
    assert (lines[0]["bundle"], lines[0]["--ckpt_path"]) == (known.bundle, str(known.folder / "model.pt"))


def test_detect_runs_the_detection_bundle(place, lines):
    main(["detect", "scan.nii.gz", "--weights", LESIONS])
    assert (lines[0]["bundle"], lines[0]["--output_dir"]) == (LESIONS, str(place / "scan_detected"))


@pytest.mark.parametrize("bundle", RECORDS)
def test_evaluate_finds_the_bundle_of_every_kind_of_run(place, lines, bundle):
    (place / "data").mkdir()
    main(["evaluate", bundle, "data", *(["--part", "test"] if bundle != PRETRAINING else [])])
    (line,) = lines
    assert (line["bundle"], line["--config_file"]) == (bundle, "['configs/train.yaml', 'configs/evaluate.yaml']")
    assert line["--args_file"] == str(place / bundle / "models" / "run.json")
    assert line["--output_dir"] == str(place / f"{bundle}_evaluated")
    assert line.get("--part", "test") == "test"


def test_pretrain_takes_the_small_settings_without_a_gpu_and_those_that_are_given(place, lines, monkeypatch, capsys):
    (place / "pictures").mkdir()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    main(["pretrain", "pictures", "-o", "mine", "--epochs", "2"])
    assert json.loads(capsys.readouterr().out) == {"encoder": str(place / "mine" / "models" / "encoder.pt")}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    main(["pretrain", "pictures"])
    small, published = lines
    assert (small["--epochs"], small["--base_channels"], small["--ckpt_dir"]) == ("2", "16", str(place / "mine/models"))
    assert "--base_channels" not in published


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (f"evaluate {ORGANS} none", "none: no such folder; give the data that the training was given"),
        ("pretrain none", "none: no such folder; give one with a folder of images for each class"),
        (f"detect scan.nii.gz --weights {ORGANS}", r"run\.json: not of a detection"),
    ],
)
def test_what_cannot_be_scored_or_trained_on_is_said_in_a_sentence(place, lines, words, sentence):
    with pytest.raises(SystemExit, match=sentence):
        main(words.split())
    assert not lines


def test_the_line_that_is_printed_is_quoted_for_people_and_is_one_for_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner.subprocess, "run", lambda *words, **more: SimpleNamespace(returncode=0))
    words = ["--config_file", "['configs/a.yaml']", "--x", "a b", "--y", "it's $HOME", "--z", "'$a'"]
    runner.run_line(tmp_path, words, tmp_path / "out")
    line = capsys.readouterr().err.strip()
    assert """ --config_file "['configs/a.yaml']" --x 'a b' --y """ in line
    assert shlex.split(line.partition("; ")[2]) == ["python", "-m", "monai.bundle", "run", *words]


def test_what_shipped_weights_are_for_is_said_before_they_are_used(place, lines, capsys):
    main(["segment", "scan.nii.gz", "-o", "out", "--weights", "hippocampus_mr_w16"])
    assert "hippocampus_mr_w16 (hippocampus in MR, two parts), into" in capsys.readouterr().err

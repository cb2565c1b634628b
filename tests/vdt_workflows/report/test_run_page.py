"""The page of a run: what it holds, and what its viewer does in a browser that is offline."""

import json
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from vdt_workflows.report.run_page import find_cases, report_run
from vdt_workflows.report.viewer import draw_boxes, take_niivue
from vdt_workflows.training.runs import draw_curves

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path, volumes):
    """The folder of a run that trained two epochs and segmented two volumes."""
    rows = [{"epoch": 1.0, "train_loss": 2.5, "val_mean_dice": 0.125}, {"epoch": 2.0, "train_loss": 1.5}]
    (tmp_path / "eval").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "eval" / "history.csv").write_text("epoch,train_loss,val_mean_dice\n1,2.5,0.125\n2,1.5,\n")
    (tmp_path / "eval" / "curves.png").write_bytes(draw_curves(rows, "curves"))
    (tmp_path / "eval" / "scores.json").write_text(json.dumps({"mean_dice": 0.4375, "_run_": {"part": "test"}}))
    (tmp_path / "eval" / "cases.csv").write_text("case,dice\n<b>x</b> $\\alpha$,0.5\n")
    settings = {"label_names": ["background", "<b>left</b>", "right"], "_run_": {"torch": "9.8.7", "seed": 3}}
    (tmp_path / "models" / "run.json").write_text(json.dumps(settings))
    images = [volumes / "images" / f"case{i}.nii.gz" for i in range(2)]
    for i in range(2):
        shutil.copy(volumes / "labels" / f"case{i}.nii.gz", tmp_path / "eval" / f"case{i}_seg.nii.gz")
    record = {"label_names": settings["label_names"], "volumes": [str(path) for path in images]}
    (tmp_path / "eval" / "inference.json").write_text(json.dumps(record))
    return tmp_path


def test_the_page_holds_the_curves_scores_settings_and_provenance(run):
    answer = report_run(str(run), volumes=0)
    page = Path(answer["page"]).read_text()
    for text in ("0.4375", "0.125", "data:image/png;base64,", "9.8.7", "label_names", "test", "vdt-bundles"):
        assert text in page
    assert answer["pictures"] == 1
    assert "&lt;b&gt;x&lt;/b&gt; $\\alpha$" in page  # names are text
    assert "<b>" not in page
    assert "http" not in page  # nothing is fetched


def test_the_viewer_and_its_licence_are_in_the_page(run):
    pytest.importorskip("ipyniivue")
    answer = report_run(str(run))
    page = Path(answer["page"]).read_text()
    assert answer["volumes"] == 2
    assert "BSD 2-Clause License" in page
    assert page.count('type="text/plain" id="mask-') == 2
    assert "<b>left" not in page


def test_without_ipyniivue_the_command_that_installs_it_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    monkeypatch.setattr("vdt_workflows.report.viewer.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs ipyniivue, .*: pip install 'ipyniivue.*'; without it"):
        report_run(str(run))


def test_a_mask_on_another_grid_is_refused(run, volumes):
    labels = nib.load(volumes / "labels" / "case0.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(labels.dataobj), np.eye(4)), run / "eval" / "case0_seg.nii.gz")
    with pytest.raises(ValueError, match=r"case0_seg\.nii\.gz: lies on another grid than"):
        report_run(str(run))


@pytest.mark.parametrize(("name", "sentence"), [("none", "no such folder"), (".", "nothing of a run in it")])
def test_a_folder_without_a_run_is_named(tmp_path, name, sentence):
    with pytest.raises((FileNotFoundError, ValueError), match=sentence):
        report_run(str(tmp_path / name))


def test_the_edges_of_a_box_are_drawn_in_every_slice_it_reaches():
    mask = draw_boxes((8, 9, 10), [[1, 2, 3, 5, 6, 7]])
    assert mask[:, :, 3:8].any((0, 1)).all()
    assert not mask[:, :, [2, 8]].any()
    assert mask[1, 4, 5] == mask[3, 6, 5] == 1
    assert mask[3, 4, 5] == 0  # hollow


def test_boxes_of_a_searched_volume_are_shown_on_its_grid(run, volumes):
    image = volumes / "images" / "case2.nii.gz"
    lesions = [{"box_voxel": [2.0, 3.0, 4.0, 8.0, 9.0, 6.0]}]
    (run / "eval" / "case2_lesions.json").write_text(json.dumps({"image": str(image), "lesions": lesions}))
    cases = find_cases({path.name: path for path in (run / "eval").iterdir()}, 3)
    assert [case.name for case in cases] == ["case0", "case1", "case2: 1 boxes"]
    assert cases[2].image.shape == cases[2].mask.shape == (20, 22, 15)
    assert [int(axis.min()) for axis in np.nonzero(cases[2].mask)] == [2, 3, 4]
    np.testing.assert_allclose(cases[2].affine, nib.load(image).affine)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_slices_and_goes_through_them_offline(run):
    pytest.importorskip("ipyniivue")
    api = pytest.importorskip("playwright.sync_api")
    take_niivue()
    page_path = report_run(str(run))["page"]
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_context(offline=True).new_page()
        page.set_default_timeout(120_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{page_path}")
        page.wait_for_function("document.body.dataset.shown === '0'")
        crosshair = "[...reportViewer.scene.crosshairPos]"
        canvas = page.locator("#niivue")
        canvas.scroll_into_view_if_needed()
        first, pixels = page.evaluate(crosshair), canvas.screenshot()
        assert len(np.unique(np.frombuffer(pixels, np.uint8))) > 100  # something is drawn
        canvas.focus()
        page.keyboard.press("ArrowUp")
        page.wait_for_timeout(1000)
        second = page.evaluate(crosshair)
        assert second[2] > first[2]
        assert canvas.screenshot() != pixels
        place = canvas.bounding_box()
        page.mouse.move(place["x"] + 0.1 * place["width"], place["y"] + 0.2 * place["height"])
        page.mouse.wheel(0, 100)
        page.wait_for_timeout(1000)
        assert page.evaluate(crosshair)[2] != second[2]
        assert re.fullmatch(r"R, A, S: (-?\d+\.\d, ){2}-?\d+\.\d mm *[\w ]*", page.inner_text("#place"))
        page.select_option("#case", "1")
        page.wait_for_function("document.body.dataset.shown === '1'")
        browser.close()
    assert errors == []

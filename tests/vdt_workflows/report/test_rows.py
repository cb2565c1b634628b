"""The rows of a comparison, and which settings go with them."""

import json

import pytest

from tests.support.bundle_runs import ROOT
from vdt_workflows.report.rows import Row, choose_reference, merge_settings, name_weights, read_rows
from vdt_workflows.training.shipped import find_weights, list_weights


def test_words_and_a_file_give_the_same_rows(tmp_path, monkeypatch):
    encoder = tmp_path / "encoder.pt"
    encoder.write_bytes(b"weights")  # which nothing reads
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    file = tmp_path / "rows.yaml"
    file.write_text("- name: scratch\n- {name: vdt, pretrained: '${WEIGHTS}/encoder.pt'}\n")
    words, listed = read_rows(f"scratch,vdt={encoder}"), read_rows(str(file))
    assert words == listed
    assert words == [Row("scratch", "scratch"), Row("vdt", "vdt", str(encoder))]
    file.write_text(json.dumps({"rows": [{"name": "scratch"}, {"name": "vdt", "pretrained": str(encoder)}]}))
    assert read_rows(str(file)) == words


@pytest.mark.parametrize(
    ("rows", "error", "sentence"),
    [
        ("scratch,genesys=x.pt", ValueError, r"row 'genesys': init must be 'scratch', 'vdt', .*got 'genesys'"),
        ("scratch,vdt=none.pt", FileNotFoundError, r"row 'vdt': pretrained .*none\.pt: no such file"),
        ("scratch,scratch", ValueError, "'scratch' names two rows"),
        ("none.yaml", FileNotFoundError, r"rows none\.yaml: no such file"),
        ([{"name": "a", "pretraind": "x"}], ValueError, "'pretraind' is unknown; did you mean pretrained"),
        ([{"name": "a", "init": "scratch", "configs": "x.yaml"}], FileNotFoundError, r"config .*x\.yaml: no such file"),
        ([{"init": "scratch"}], ValueError, "is no row; expected a mapping with name, init"),
        ("", ValueError, "is no row"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows, error, sentence):
    with pytest.raises(error, match=sentence):
        read_rows(rows)


def test_the_reference_is_scratch_or_the_first_row():
    rows = read_rows([{"name": "a", "init": "scratch"}, "scratch"])
    assert choose_reference(rows, "") == "scratch"
    assert choose_reference(rows[:1], "") == "a"
    with pytest.raises(ValueError, match="reference must be one of the rows a, scratch, got 'b'"):
        choose_reference(rows, "b")


def test_settings_of_a_network_do_not_reach_a_row_that_replaces_it(tmp_path):
    whole, part = tmp_path / "whole.yaml", ROOT / "bundles" / "bcv_multiorgan_segmentation" / "configs" / "genesis.yaml"
    whole.write_text("network_def: {_target_: monai.networks.nets.UNet}\n")
    own = {"network_def::channels": [4]}
    shared = {"network_def#network#stem": "flat", "network_def::restore": False, "seed": 1}
    rows = [{"name": str(i), "init": "scratch", "configs": c} for i, c in enumerate(([str(whole)], [str(part)], []))]
    rows[0]["settings"] = own
    found = [merge_settings(shared, row) for row in read_rows(rows)]
    assert found == [{"seed": 1, **own}, {"network_def::restore": False, "seed": 1}, shared]


def test_a_row_that_takes_a_shipped_encoder_is_known_by_its_hash():
    scratch, vdt, wide = (
        name_weights(row, {"base_channels": 16})
        for row in read_rows(["scratch", "vdt", {"name": "wide", "init": "vdt", "settings": {"base_channels": 64}}])
    )
    shipped = list_weights()
    assert scratch.identity()["weights"] is None
    assert vdt.identity()["weights"] == shipped["vdt_resnet3d18_w16"].sha256["model.pt"]
    assert wide.identity()["weights"] == shipped["vdt_resnet3d18_w64"].sha256["model.pt"]
    with pytest.raises(ValueError, match="there is none of depth 18 and base_channels 8"):
        name_weights(read_rows("i3d")[0], {"base_channels": 8})


def test_a_row_may_name_shipped_weights():
    (row,) = read_rows("vdt=vdt_resnet3d18_w16")
    assert row.pretrained == str(find_weights("vdt_resnet3d18_w16") / "model.pt")

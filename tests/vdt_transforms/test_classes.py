"""Classes out of JSON files."""

import json

import pytest

from vdt_transforms import ReadClass, ReadClassd

NAMES = ["benign", "malignant"]


def test_numbers_pass_and_files_are_read(tmp_path):
    (tmp_path / "named.json").write_text(json.dumps({"label": "Malignant"}))
    answer = [{"idx": 0, "label": "benign", "score": 0.7}, {"idx": 1, "label": "malignant", "score": 0.3}]
    (tmp_path / "answered.json").write_text(json.dumps({"prediction": answer}))
    item = {"a": 1, "b": str(tmp_path / "named.json"), "c": tmp_path / "answered.json", "image": "x"}
    assert ReadClassd(["a", "b", "c"], NAMES)(item) == {"a": 1, "b": 1, "c": 0, "image": "x"}
    assert item["b"] == str(tmp_path / "named.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"label": 1}', '{"prediction": []}', '{"prediction": [1]}'])
def test_a_file_without_a_class_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r'x\.json: not the class of an image; expected JSON such as {"label": "mali'):
        ReadClass(NAMES)(path)


def test_a_mask_an_unknown_class_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "mask.nii.gz").write_bytes(b"\x1f\x8b\x00\xff")
    with pytest.raises(ValueError, match=r"mask\.nii\.gz: not the class of an image"):
        ReadClass(NAMES)(tmp_path / "mask.nii.gz")
    (tmp_path / "x.json").write_text('{"label": "unsure"}')
    with pytest.raises(ValueError, match=r"x\.json: no class is called 'unsure'; there are benign, malignant"):
        ReadClass(NAMES)(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such label file"):
        ReadClass(NAMES)(tmp_path / "none.json")

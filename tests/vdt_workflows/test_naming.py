"""Names that tell results apart, and text that stays text."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import SaveImage

from vdt_workflows.naming import list_results, literal, name_result, name_results, plain, result_name, tell_apart

ODD = (
    *("@home", "%home", "$__import__('os').getpid()", "C#", "x#y@z", " @a", "a@::b", "50%", "$'quoted'", '$"a"', "#"),
    *(
        "@",
        "$",
        "%",
        "a\nb",
        "\\x41",
        "it's",
        '"',
        "networks.P3D $",
        "$import os",
        "%file.json::a",
        "Größe#",
        "\U0001d6fc#",
    ),
)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["d/a.nii.gz", "d/b.nii"], ["a", "b"]),
        (["d/1.3.6.1.100", "d/1.3.6.1.200"], ["1.3.6.1.100", "1.3.6.1.200"]),
        (["P2/image.nii.gz", "P3/image.nii.gz", "P3/other.nii"], ["P2_image", "P3_image", "other"]),
        (["P2/s/ct", "P3/s/ct", "P3/t/ct"], ["P2_s_ct", "P3_s_ct", "P3_t_ct"]),
        (["d/a.nii", "d/a.nii.gz", "d/a.NII.GZ", "d/a.mha"], ["a", "a_2", "a_3", "a_4"]),
        (["d/Case.nii", "d/case.nii", "d/case_2.nii"], ["Case", "Case_3", "case_2"]),
        (["d/Gr\u00f6\u00dfe.nii", "d/Gro\u0308\u00dfe.nii"], ["Gr\u00f6\u00dfe", "Gr\u00f6\u00dfe_2"]),
        (["a_b/c.nii", "a/b_c.nii", "a/c.nii", "a_b/b_c.nii"], ["a_b_c", "a_b_c_2", "a_c", "a_b_b_c"]),
    ],
)
def test_names_come_from_the_part_of_the_path_that_differs(paths, names):
    assert list(tell_apart(paths).values()) == names


def test_names_too_long_for_a_disk_are_cut_and_stay_apart(tmp_path):
    paths = [str(tmp_path / f"{'ö' * 120}{end}.nii.gz") for end in "ab"]
    names = list(tell_apart(paths).values())
    assert len({*names}) == 2
    for name in names:
        (tmp_path / f".{name}_lesions.mrk.json.{'x' * 30}").touch()


def test_no_segmentation_replaces_another_or_the_volume_itself(tmp_path):
    sources = [str(tmp_path / name) for name in ("1.2.100", "1.2.200", "P2/i.nii", "P3/i.nii", "x", "x_seg.nii.gz")]
    name_results(sources)
    save = SaveImage(tmp_path / "out", "seg", output_name_formatter=name_result, separate_folder=False, print_log=False)
    for source in sources[:5]:
        save(MetaTensor(np.ones((1, 2, 2, 2), np.uint8), meta={"filename_or_obj": source}))
    found = [f"{name}_seg.nii.gz" for name in ("1.2.100", "1.2.200", "P2_i", "P3_i", "x")]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(found)
    assert list(list_results(sources[:5], tmp_path / "out").values()) == [[file] for file in found]
    save.folder_layout.output_dir = tmp_path
    with pytest.raises(ValueError, match=r"x: its result would replace the volume .*x_seg.nii.gz; name another output"):
        save(MetaTensor(np.ones((1, 2, 2, 2), np.uint8), meta={"filename_or_obj": str(tmp_path / "x")}))


def test_a_volume_that_was_not_listed_keeps_its_own_name():
    assert [result_name(path) for path in ("elsewhere/1.2.3", "e/a.b.nii.gz", "e/.nii")] == ["1.2.3", "a.b", ".nii"]


def test_a_text_in_a_config_is_what_it_was(tmp_path):
    texts = [*ODD, *(f"{odd}{more}" for odd in ODD for more in ODD)]
    config = {"home": 1, "names": literal(texts), "each": {str(i): literal(text) for i, text in enumerate(texts)}}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config))
    parser = ConfigParser(ConfigParser.load_config_files(str(file)))
    assert parser.get_parsed_content("names") == texts
    assert list(parser.get_parsed_content("each").values()) == texts
    assert plain(config)["names"] == texts
    assert plain(literal({"a": [texts, 1, None, "plain"]})) == {"a": [texts, 1, None, "plain"]}
    assert plain("$1 + 1") == "$1 + 1"
    assert Path(literal("/x/run#1")).name == r"run\x231'"

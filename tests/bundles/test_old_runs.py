"""Settings of runs as early versions wrote them: training, evaluation and inference still know them all."""

import pytest

from tests.support.bundle_runs import ROOT, config_files, parse
from vdt_workflows import check_command_line
from vdt_workflows.packaging.package import read_run

SEGMENTATION = """
    "protocol": "recommended", "label_names": ["background", "liver"], "pairs": [], "depth": 18, "base_channels": 4,
    "stem": "unet", "norm": "batch", "spacing": "own", "window": [-200, 250], "mean": 18.25, "std": 103.05,
    "patch_size": [16, 24, 16], "overlap": 0.25, "blending": "gaussian", "inversion": "labels", "largest_component": [1]
"""
RUNS = {  # the settings, and tensors and numbers in the model.pt that was written with them
    "bcv_multiorgan_segmentation": (SEGMENTATION.replace('"liver"', '"a", "b"'), 206, 170_417),
    "lits_liver_segmentation": (SEGMENTATION, 206, 170_400),
    "lidc_nodule_segmentation": (
        """
        "protocol": "recommended", "label_names": ["background", "nodule"], "depth": 18, "base_channels": 4,
        "norm": "batch", "spacing": [1.0, 1.0, 1.0], "window": [-1024, 400], "mean": -333.36, "std": 326.096,
        "patch_size": [16, 16, 16], "largest_component": []
        """,
        140,
        141_653,
    ),
    "lidc_nodule_classification": (
        """
        "protocol": "recommended", "label_rule": "mode", "class_names": ["benign", "malignant"], "depth": 18,
        "base_channels": 4, "norm": "batch", "crop_size": 16, "spacing": 1.0, "window": [-1024, 400], "mean": 99,
        "std": 77, "threshold": 0.5
        """,
        122,
        132_066,
    ),
    "imagenet_vdt_pretraining": (
        """
        "depth": 18, "base_channels": 4, "norm": "batch", "image_size": 32, "short_side": 37, "mean": 114.495,
        "std": 57.63, "grey": false, "class_names": ["blue", "green", "red"]
        """,
        122,
        132_099,
    ),
    "deeplesion_lesion_detection": (
        """
        "depth": "18ba", "conversion": "group", "slices": 9, "distance": 2.5, "window": [-1024, 1050],
        "value_range": [-2.118, 2.249], "pad_value": -2.118, "size": 80, "base_channels": 4, "pyramid_channels": 16,
        "head_channels": 32
        """,
        142,
        100_721,
    ),
}


@pytest.mark.parametrize("names", [["train", "evaluate"], ["inference"]], ids="+".join)
@pytest.mark.parametrize("name", RUNS)
def test_an_old_record_is_taken_whole_and_builds_the_network_of_its_weights(tmp_path, name, names):
    text, tensors, numbers = RUNS[name]
    record = tmp_path / "run.json"
    record.write_text(f'{{{text}, "_run_": {{"init": "scratch", "epochs": 2, "seed": 0}}}}')
    bundle = ROOT / "bundles" / name
    check_command_line(["run", "--config_file", str(config_files(bundle, names)), "--args_file", str(record)])
    settings, noted = read_run(record)
    assert noted["init"] == "scratch"
    state = parse(bundle, names, **settings).get_parsed_content("network_def").state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (tensors, numbers)

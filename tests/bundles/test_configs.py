"""What each bundle's folder holds and its configs say; a new folder in bundles/ is tested by being there."""

import re

import monai.bundle
import pytest
from monai.bundle import ConfigParser

from networks import GenesisUNet3D, ResNet3D
from tests.support.bundle_runs import BUNDLES, ROOT, config_files, parse, read

SCHEMA = ROOT / "vdt_workflows" / "packaging" / "metadata_schema.json"
YAML = sorted([*ROOT.glob("bundles/*/configs/*.yaml"), *ROOT.glob("docs/**/*.yaml")])

# Ids that an overlay may add to its base.
ADDED = {
    *("ckpt_path", "part", "surfaces", "intervals", "pictures", "scores"),
    *("network_def::network::head_std", "network_def::network::zero_init_residual"),
    *("sync_bn", "finalize", "pretrained", "network_def::network", "network_def::network::shortcut"),
    *("minutes", "began", "clock", "held_out", "rate", "+train::handlers", "timing", "recipe::timing"),
}


def complete(bundle, name):
    return ConfigParser.load_config_file(config_files(bundle, [name])[0])


def test_licence_and_logging_are_copies_of_one_original(bundle):
    assert (bundle / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (bundle / "configs" / "logging.conf").read_bytes() == (BUNDLES[0] / "configs" / "logging.conf").read_bytes()


def test_metadata_meets_the_schema_and_its_changelog_has_the_version(bundle):
    meta = bundle / "configs" / "metadata.json"
    monai.bundle.verify_metadata(meta_file=str(meta), filepath=str(SCHEMA))
    assert read(meta)["version"] in read(meta)["changelog"]


def test_metadata_lists_what_the_package_requires(bundle):
    listed = read(bundle / "configs" / "metadata.json")["required_packages_version"]
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
    required = set(re.findall(r'"([A-Za-z-]+)[>=]', block)) - {"torch", "monai", "numpy"}
    assert set(listed) == required | {"jsonschema"}  # for `monai.bundle verify_metadata`


def test_labels_in_the_metadata_are_those_of_the_configs(bundle):
    names = complete(bundle, "inference").get("label_names")
    if names is None:
        pytest.skip("not a segmentation")
    channels = read(bundle / "configs" / "metadata.json")["network_data_format"]["outputs"]["pred"]
    assert [channels["channel_def"][str(i)] for i in range(len(names))] == names
    assert channels["num_channels"] == len(names)


def test_the_network_has_the_shapes_of_the_metadata(bundle):
    monai.bundle.verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=config_files(bundle, ["inference"]),
        device="cpu",
        base_channels=8,  # of 64; shapes do not depend on it
    )


def expressions(node):
    """Every expression below a node of a config."""
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from expressions(child)
    elif isinstance(node, str) and node.startswith("$"):
        yield node


@pytest.mark.parametrize("path", YAML, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_no_line_has_more_than_120_columns_and_no_expression_more_than_80(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []
    content = ConfigParser.load_config_file(str(path))
    assert [expression for expression in expressions(content) if len(expression) > 80] == []


def test_the_configs_of_a_bundle_keep_their_budget(bundle):
    assert sum(len(path.read_text().splitlines()) for path in YAML if bundle in path.parents) <= 600


def test_training_and_inference_share_what_is_marked_shared(bundle):
    train, inference = complete(bundle, "train"), complete(bundle, "inference")
    marked = re.findall(r"^(\w+):.*# \[shared\]", (bundle / "configs" / "train.yaml").read_text(), re.MULTILINE)
    derived = {"class_names", "num_classes"}  # counted from the data in training, taken from run.json in inference
    assert "network_def" in marked
    for name in set(marked) - derived:
        assert inference[name] == train[name], name


def test_training_and_inference_prepare_images_alike(bundle):
    if bundle.name == "deeplesion_lesion_detection":
        pytest.skip("slices in training, volumes in inference: tests/networks/test_volume_detector.py compares them")
    config, inference = complete(bundle, "train"), complete(bundle, "inference")
    train, validate = config["train"], config["validate"]
    steps = validate.get("transforms", validate["preprocessing"].get("transforms"))
    prepared = [train.get("loading", []) + steps]
    if "deterministic_transforms" in train:
        prepared.append(train["loading"] + train["deterministic_transforms"])
    for steps in prepared:
        on_image = [for_image(step) for step in steps if step["keys"] != "label"]
        assert on_image == [without_irregular(step) for step in inference["preprocessing"]["transforms"]]
    if "inferer" in inference:
        assert inference["inferer"] == validate["inferer"]
    if "postprocessing" in inference:
        theirs, ours = (c["postprocessing"]["transforms"] for c in (inference, validate))
        ours = [step for step in ours if step["keys"] == "pred" and "names" not in step]  # `names`: a copy for a metric
        assert theirs[: len(ours)] == ours  # inference may go on, to save


def without_irregular(step):
    """A step of inference, whose reader alone may be told to accept irregular series."""
    return {name: value for name, value in step.items() if name != "irregular"}


def for_image(step):
    """Project a transform of image and label onto the image; a training crop may be larger, to be jittered."""
    step = dict(step, keys="image")
    if step["_target_"] == "ResizeWithPadOrCropd":
        step["spatial_size"] = "@patch_size"
    for name in ("mode", "dtype"):
        if isinstance(step.get(name), list):
            step[name] = step[name][0]
    return step


def test_overlays_name_only_ids_of_their_base(bundle):
    base = parse(bundle)
    for path in sorted((bundle / "configs").glob("*.yaml")):
        names = set(ConfigParser.load_config_file(str(path))) - ADDED if path.stem not in ("train", "inference") else ()
        assert [name for name in names if name not in base] == [], path.name


def test_every_remembered_setting_bears_its_own_name_and_is_an_id_of_inference(bundle):
    train, inference = complete(bundle, "train"), complete(bundle, "inference")
    assert train["settings"] == {name: f"@{name}" for name in train["settings"]}
    assert set(train["settings"]) <= set(inference)


@pytest.mark.parametrize(
    ("names", "pairs", "mirror"),
    [
        ([], [[2, 3], [12, 13]], 0.5),  # the bundle's own
        (["background", "a", "b", "c"], [], 0.5),
        (["background", "left lung", "right lung"], [[1, 2]], 0.5),
        (["background", "left lung", "liver"], [], 0.0),
    ],
)
@pytest.mark.parametrize("configs", [["train"], ["train", "paper"]])
def test_labels_that_change_places_are_those_that_the_names_tell(configs, names, pairs, mirror):
    parser = parse(
        ROOT / "bundles" / "bcv_multiorgan_segmentation", configs, **({"label_names": names} if names else {})
    )
    assert parser.get_parsed_content("pairs") == pairs
    assert parser.get_parsed_content("mirror") == mirror


OTHERS = {"medicalnet": (ResNet3D, 4), "genesis": (GenesisUNet3D, 3)}


@pytest.mark.parametrize("name", OTHERS)
def test_overlays_of_other_networks_are_the_same_in_every_bundle_and_serve_inference(name):
    kind, number = OTHERS[name]
    paths = sorted((ROOT / "bundles").glob(f"*/configs/{name}.yaml"))
    assert len(paths) == number
    assert len({path.read_text() for path in paths}) == 1
    for bundle in (path.parent.parent for path in paths):
        for base in ("train", "inference"):
            network = parse(bundle, [base, name], base_channels=4, num_classes=2).get_parsed_content("network_def")
            (inner,) = (m for m in network.modules() if isinstance(m, kind))
            assert name != "medicalnet" or inner.architecture["shortcut"] == "A"


OPTIMISERS = [
    (path.parents[1], ["train"] if path.stem == "train" else ["train", path.stem])
    for path in sorted(ROOT.glob("bundles/*/configs/*.yaml"))
    if path.stem in ("train", "paper", "short") and "rated" in path.read_text()
]


@pytest.mark.parametrize(("bundle", "configs"), OPTIMISERS, ids=lambda value: getattr(value, "name", str(value)))
def test_the_encoder_learns_at_its_own_rate_where_asked(bundle, configs):
    assert len(OPTIMISERS) == 9
    parser = parse(bundle, configs, base_channels=4, learning_rate=0.5, encoder_rate=0.1, device="cpu")
    others, encoder = parser.get_parsed_content("optimizer").param_groups
    assert (others["lr"], encoder["lr"]) == (0.5, pytest.approx(0.05))
    named = dict(parser.get_parsed_content("network").named_parameters())
    assert [id(w) for w in encoder["params"]] == [id(w) for name, w in named.items() if "backbone." in name]
    assert [id(w) for w in others["params"]] == [id(w) for name, w in named.items() if "backbone." not in name]

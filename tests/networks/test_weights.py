from __future__ import annotations

import copy
import logging
import os

import pytest
import torch
import torchvision
from torch import nn

from networks import LoadReport, ResNet3D, ResNet3DClassifier, ResUNet3D, load_pretrained, read_checkpoint
from tests.support.network_checks import randomise


def narrow(depth=18, **arguments):
    return ResNet3D(depth, **{"base_channels": 8, **arguments})


def same_weights(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.fixture
def save(tmp_path):
    """Save what a checkpoint holds, or a network's weights, and return the path."""

    def save(content, name="checkpoint.pt", **arguments):
        content = content.state_dict() if isinstance(content, nn.Module) else content
        torch.save(content, tmp_path / name, **arguments)
        return tmp_path / name

    return save


# The report


def test_report_of_a_whole_match_lists_every_tensor(save):
    source, network = randomise(narrow()), narrow()
    report = load_pretrained(network, save(source))
    assert sorted(report.matched) == sorted(source.state_dict())
    assert (report.folded, report.skipped, report.left_random) == ([], {}, [])
    assert same_weights(network, source)


def test_report_of_a_transfer_tells_what_happened_to_every_tensor(save):
    source = randomise(ResNet3DClassifier(18, 10, base_channels=8, in_channels=3))
    network = ResUNet3D(2, base_channels=8)
    head = copy.deepcopy(network.decode_head.state_dict())
    path = save(source)
    report = load_pretrained(network, path)
    assert report.path == str(path)
    assert report.folded == ["backbone.conv1.weight"]
    assert sorted(report.matched + report.folded) == sorted(n for n in network.state_dict() if n.startswith("backbone"))
    assert report.skipped == {name: "ResUNet3D has no such layer" for name in ("head.fc.weight", "head.fc.bias")}
    assert sorted(report.left_random) == sorted(
        name
        for name in network.state_dict()
        if not name.startswith("backbone") and not name.endswith("num_batches_tracked")
    )
    assert all(torch.equal(tensor, head[name]) for name, tensor in network.decode_head.state_dict().items())


def test_report_reads_as_sentences(save, caplog):
    source = ResNet3DClassifier(18, 10, base_channels=8, in_channels=3)
    path = save(source)
    with caplog.at_level(logging.INFO, logger="networks.weights"):
        report = load_pretrained(ResUNet3D(2, base_channels=8), path)
    lines = str(report).splitlines()
    assert lines[0] == f"{path}: 119 tensors matched, 1 folded, 2 skipped, 72 left random"
    assert lines[1] == "  folded to one channel: backbone.conv1.weight"
    assert lines[2] == "  skipped, ResUNet3D has no such layer: head.fc.weight, head.fc.bias"
    assert lines[3].startswith("  left random: neck.decoder.3.reduce.conv.weight, neck.decoder.3.reduce.bn.weight, ")
    assert lines[3].endswith(" and 66 more")
    assert caplog.messages == [str(report)]


def test_report_of_nothing_special_is_one_line():
    assert str(LoadReport("a.pt", matched=["conv1.weight"])) == (
        "a.pt: 1 tensors matched, 0 folded, 0 skipped, 0 left random"
    )


# Stems for RGB


@pytest.fixture
def rgb(save):
    network = randomise(narrow(in_channels=3)).eval()
    return network, save(network, "rgb.pt")


def test_summed_rgb_stem_answers_a_grey_volume_as_rgb_answered_it_three_times(rgb):
    network, path = rgb
    grey = narrow().eval()
    assert load_pretrained(grey, path).folded == ["conv1.weight"]
    x = torch.randn(1, 1, 3, 32, 33)
    torch.testing.assert_close(grey(x)[0], network(x.repeat(1, 3, 1, 1, 1))[0], rtol=1e-4, atol=1e-4)


def test_averaged_rgb_stem_answers_a_third_of_it(rgb):
    network, path = rgb
    grey = narrow().eval()
    assert load_pretrained(grey, path, stem="mean").folded == ["conv1.weight"]
    x = torch.randn(1, 1, 3, 32, 33)
    torch.testing.assert_close(grey.conv1(x), network.conv1(x.repeat(1, 3, 1, 1, 1)) / 3)


def test_half_precision_rgb_stem_is_summed_in_single_precision(rgb, save):
    network, _ = rgb
    grey = narrow()
    load_pretrained(grey, save({name: tensor.half() for name, tensor in network.state_dict().items()}))
    assert torch.equal(grey.conv1.weight, network.conv1.weight.half().float().sum(1, keepdim=True))


def test_rgb_stem_stays_whole_in_an_rgb_network(rgb):
    network, path = rgb
    twin = narrow(in_channels=3)
    assert load_pretrained(twin, path).folded == []
    assert same_weights(twin, network)


def test_grey_stem_is_refused_by_an_rgb_network(save):
    with pytest.raises(ValueError, match=r"conv1\.weight is 8 x 1 x 7 x 7 x 7 in the file, 8 x 3 x 7 x 7 x 7 in the"):
        load_pretrained(narrow(in_channels=3), save(narrow()))


def test_unknown_way_to_fold_the_stem_is_named(rgb):
    with pytest.raises(ValueError, match="stem must be one of 'sum', 'mean', got 'first'"):
        load_pretrained(narrow(), rgb[1], stem="first")


# Heads, and what an encoder may leave out


@pytest.mark.parametrize(
    ("there", "here", "layer"),
    [
        pytest.param(
            lambda: ResNet3DClassifier(18, 10, base_channels=8),
            lambda: ResNet3DClassifier(18, 4, base_channels=8),
            "head.fc",
            id="classifier",
        ),
        pytest.param(
            lambda: ResUNet3D(14, base_channels=8), lambda: ResUNet3D(2, base_channels=8), "decode_head.conv_seg",
            id="segmentation",
        ),
    ],
)  # fmt: skip
def test_head_for_other_classes_is_skipped_with_the_reason_and_stays_random(there, here, layer, save):
    network = here()
    before = copy.deepcopy(network.state_dict())
    report = load_pretrained(network, save(randomise(there())))
    assert list(report.skipped) == report.left_random == [f"{layer}.weight", f"{layer}.bias"]
    assert all("for other classes, the network has" in reason for reason in report.skipped.values())
    assert len(report.matched) == len(before) - 2
    for name in report.left_random:
        assert torch.equal(network.state_dict()[name], before[name])


def test_other_widths_of_the_segmentation_head_are_refused(save):
    with pytest.raises(ValueError, match=r"decode_head.convs.0.conv.weight is 16 x 8 .* in the file, 4 x 8 "):
        load_pretrained(ResUNet3D(2, base_channels=8, head_channels=4), save(ResUNet3D(2, base_channels=8)))


def test_stages_that_the_network_does_not_build_are_skipped(save):
    source, network = randomise(narrow()), narrow(out_indices=(1,))
    report = load_pretrained(network, save(source))
    assert same_weights(network, source.eval())
    assert set(report.skipped.values()) == {"ResNet3D has no such layer"}
    assert {name.split(".")[0] for name in report.skipped} == {"layer3", "layer4"}


def test_file_without_a_wanted_stage_is_refused(save):
    with pytest.raises(ValueError, match=r"layer3\.0\.conv1\.weight is in the network only"):
        load_pretrained(narrow(), save(narrow(out_indices=(1,))))


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_a_batch_norm_file_is_refused_by_another_norm(save, norm):
    with pytest.raises(
        ValueError, match=r"has batch norms \(bn1\.running_mean\), .*; build the network with norm 'batch'"
    ):
        load_pretrained(narrow(norm=norm), save(narrow()))


# Refusals


@pytest.mark.parametrize(
    ("there", "here", "sentence"),
    [
        pytest.param({"depth": 34}, {}, "layer1.2.conv1.weight is in the file only", id="deeper-file"),
        pytest.param({}, {"depth": 34}, "layer1.2.conv1.weight is in the network only", id="deeper-network"),
        pytest.param({"depth": 50}, {}, "layer1.0.conv1.weight is 8 x 8 x 1 x 1 x 1 in the file", id="bottlenecks"),
        pytest.param({"base_channels": 16}, {}, "conv1.weight is 16 x 1 .* in the file, 8 x 1 ", id="width"),
        pytest.param({"shortcut": "A"}, {}, "layer2.0.downsample.0.weight is in the network only", id="shortcut-B"),
        pytest.param({}, {"shortcut": "A"}, "layer2.0.downsample.0.weight is in the file only", id="shortcut-A"),
        pytest.param({"norm": "group"}, {}, "bn1.running_mean is in the network only", id="norm"),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["encoder", "unet"])
def test_other_encoder_is_refused_with_the_names_and_the_network_stays_as_it_was(there, here, sentence, whole, save):
    network = narrow(**here)
    if whole:
        network = ResUNet3D(2, **{"base_channels": 8, **here})
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=sentence) as refusal:
        load_pretrained(network, save(randomise(narrow(**there))))
    assert f"does not fit {type(network).__name__}" in str(refusal.value)
    assert "Build the network with the depth, base_channels, shortcut and norm of the file" in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_weights_of_a_2d_network_are_refused(save):
    with torch.device("meta"):
        network = ResNet3D(18, in_channels=1)
    state = torchvision.models.resnet18(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"checkpoint\.pt: is a 2D network's file \(its stem is 64 x 3 x 7 x 7\); say"):
        load_pretrained(network, save(state))


def test_file_of_something_else_is_refused(save):
    with pytest.raises(ValueError, match="100 tensors differ"):
        load_pretrained(narrow(), save({"embedding.weight": torch.zeros(2, 2)}))


# Names


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(nn.DataParallel, id="data-parallel"),
        pytest.param(lambda network: torch.compile(network, backend="eager"), id="compiled"),
    ],
)
def test_wrapped_networks_save_and_load_as_their_own(wrap, save):
    source, network = randomise(ResUNet3D(2, base_channels=8)), ResUNet3D(2, base_channels=8)
    report = load_pretrained(wrap(network), save(wrap(source)))
    assert len(report.matched) == len(source.state_dict())
    assert same_weights(network, source)


def behind(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without_counters(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "network."]
FORMS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "network": lambda state: {"network": state, "optimizer": {"state": {}}},
    "nested": lambda state: {"model": {"state_dict": state}},
    "no counters of batches": without_counters,
    **{name: behind(name) for prefix in PREFIXES for name in (prefix, prefix + "backbone.")},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_every_form_of_file(form, zipped, save):
    source, network = randomise(narrow()), narrow()
    content = FORMS[form](source.state_dict())
    report = load_pretrained(network, save(content, _use_new_zipfile_serialization=zipped))
    assert not report.left_random
    assert same_weights(network, source)


def test_published_names_of_the_unet_are_ours_one_to_one(save):
    source, network = randomise(ResUNet3D(2, base_channels=8)), ResUNet3D(2, base_channels=8)
    published = {
        name.replace(".reduce.", ".upsample.interp_upsample.1.").replace(".fuse.", ".conv_block.convs."): tensor
        for name, tensor in source.state_dict().items()
    }
    assert len(set(published) - set(source.state_dict())) == 4 * 18
    report = load_pretrained(network, save(published))
    assert sorted(report.matched) == sorted(source.state_dict())
    assert same_weights(network, source)
    assert load_pretrained(network, save(network)).matched == list(source.state_dict())  # our own names stay


# Files


def test_missing_file_is_named(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such checkpoint file"):
            load_pretrained(narrow(), path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", id="git-lfs-pointer"),
        pytest.param(b"<!DOCTYPE html><title>404</title>", id="html"),
        pytest.param(b"PK\x03\x04 and no more", id="zip-header-only"),
        pytest.param(bytes(range(256)), id="noise"),
    ],
)
def test_file_that_is_no_checkpoint_is_refused_with_a_sentence(content, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not a whole PyTorch checkpoint .* download it again"):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_file_that_is_cut_off_is_refused_with_a_sentence(kept, save):
    path = save(narrow())
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(ValueError, match="not a whole PyTorch checkpoint"):
        read_checkpoint(path)


class MakeFolder:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
def test_code_in_a_file_is_refused_and_does_not_run(zipped, save, tmp_path):
    content = {"state_dict": narrow().state_dict(), "meta": MakeFolder(tmp_path / "made-by-the-file")}
    path = save(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"{path}: refused, because reading it would run code stored in the file"):
        load_pretrained(narrow(), path)
    assert not (tmp_path / "made-by-the-file").exists()


def test_whole_pickled_network_is_refused(tmp_path):
    torch.save(narrow(), tmp_path / "network.pt")
    with pytest.raises(ValueError, match="save its state dict alone with"):
        read_checkpoint(tmp_path / "network.pt")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="empty"),
        pytest.param({"epoch": 3, "state_dict": {}}, id="empty-state-dict"),
        pytest.param({"loss": [0.5, 0.4]}, id="numbers"),
        pytest.param([torch.zeros(2)], id="list"),
        pytest.param(torch.zeros(2), id="one-tensor"),
    ],
)
def test_file_without_named_tensors_is_refused(content, save):
    with pytest.raises(ValueError, match="holds no tensors; expected a state dict, bare or under one of"):
        read_checkpoint(save(content))


def test_half_precision_is_cast_to_the_networks_own(save):
    source, network = randomise(narrow()), narrow()
    load_pretrained(network, save(copy.deepcopy(source).half()))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert torch.equal(network.conv1.weight, source.conv1.weight.half().float())


def test_loaded_parameters_still_train(save):
    network = narrow()
    before = list(network.parameters())
    load_pretrained(network, save(randomise(narrow())))
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    assert all(p.requires_grad and p.is_leaf for p in network.parameters())

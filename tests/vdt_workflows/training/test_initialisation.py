import hashlib

import pytest
import torch
import torchvision
from monai.networks.nets import ResNet as MonaiResNet

from networks import (
    DepthFirst,
    FlatConv3d,
    GenesisUNet3D,
    LesionDetector,
    NoduleFCN,
    ResNet2D,
    ResNet2DClassifier,
    ResNet3D,
    ResNet3DClassifier,
    ResUNet3D,
    convert,
    load_pretrained,
)
from tests.support.network_checks import count, randomise
from vdt_workflows.training.checkpoints import load_weights, read_provenance, save_weights
from vdt_workflows.training.initialisation import initialise, pick_norm


@pytest.fixture
def encoder(tmp_path):
    """A pre-trained encoder's file and its tensors."""
    torch.manual_seed(0)
    network = ResNet3D(18, base_channels=4)
    save_weights(network, tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt", network.state_dict()


def segmenter(seed=1):
    torch.manual_seed(seed)
    return DepthFirst(ResUNet3D(2, depth=18, base_channels=4))


def copy(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def unchanged(network, before):
    return all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_from_scratch_the_random_weights_stay_and_name_no_file(tmp_path):
    network = segmenter()
    before = copy(network)
    assert initialise(network) is initialise(network, "scratch") is network
    assert unchanged(network, before)
    save_weights(network, tmp_path / "model.pt")
    assert read_provenance(tmp_path / "model.pt") == {}


def test_vdt_fills_the_encoder_and_leaves_the_decoder_random(encoder):
    file, tensors = encoder
    network = segmenter()
    before = copy(network)
    assert initialise(network, "vdt", str(file)) is network
    after = network.state_dict()
    inside = {name.split("backbone.")[1]: name for name in after if "backbone." in name}
    assert set(tensors) == set(inside)
    assert all(torch.equal(after[inside[name]], tensor) for name, tensor in tensors.items())
    others = set(after) - set(inside.values())
    assert others
    assert all(torch.equal(after[name], before[name]) for name in others)


@pytest.mark.parametrize(("stem", "part"), [("sum", 1.0), ("mean", 1 / 3)])
def test_the_stem_option_reaches_the_loader(encoder, tmp_path, stem, part):
    tensors = dict(encoder[1])
    grey = tensors["conv1.weight"]
    torch.save({**tensors, "conv1.weight": grey.repeat(1, 3, 1, 1, 1) / 3}, tmp_path / "rgb.pt")
    network = initialise(ResNet3D(18, base_channels=4), "vdt", tmp_path / "rgb.pt", stem=stem)
    torch.testing.assert_close(network.state_dict()["conv1.weight"], grey * part)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("video",), r"init must be 'scratch', 'vdt', 'i3d', .* or 'coco', got 'video'"),
        (("scratch", "m/encoder.pt"), r"init 'scratch' ignores pretrained='m/encoder\.pt'; did you mean init 'vdt'"),
        (("vdt",), "init 'vdt' needs pretrained, the path of a weights file such as models/encoder.pt"),
        (("genesis", "x.pt"), r"needs another network than ResUNet3D: .* configs/genesis\.yaml"),
    ],
)
def test_an_unknown_init_and_weights_given_or_missing_for_nothing_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        initialise(segmenter(), *given)


def test_a_missing_file_and_another_architecture_are_refused_and_change_nothing(encoder, tmp_path):
    network = segmenter()
    before = copy(network)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint file"):
        initialise(network, "vdt", tmp_path / "none.pt")
    save_weights(ResNet3D(34, base_channels=4), tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"deeper\.pt: does not fit .*is in the file only"):
        initialise(network, "vdt", tmp_path / "deeper.pt")
    assert unchanged(network, before)


def test_what_is_saved_later_says_which_file_it_started_from(encoder, tmp_path):
    file, tensors = encoder
    save_weights(initialise(segmenter(), "vdt", file), tmp_path / "model.pt", {"depth": 18})
    found = read_provenance(tmp_path / "model.pt")
    assert (found["depth"], found["init"]) == (18, "vdt")
    assert found["pretrained"]["file"] == "encoder.pt"
    assert found["pretrained"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    torch.save(tensors, tmp_path / "published.pth")
    network = initialise(segmenter(), "vdt", tmp_path / "published.pth")
    save_weights(network.network.backbone, tmp_path / "encoder_of_it.pt")
    assert read_provenance(tmp_path / "encoder_of_it.pt")["pretrained"]["provenance"] == {}


# 2D networks


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: {"state_dict": {f"module.{k}": v for k, v in n.items()}}])
@pytest.mark.parametrize("init", ["i3d", "acs", "2.5d"])
def test_a_2d_network_starts_a_segmentation_as_it_was_converted(init, wrap, tmp_path):
    source = randomise(ResNet2DClassifier(18, 7, base_channels=4))
    torch.save(wrap(source.state_dict()), tmp_path / "image.pt")
    network = initialise(segmenter(), init, tmp_path / "image.pt")
    grey = torch.randn(1, 1, 24, 32, 40)
    source.backbone[3].stride, source.backbone[0].stride = 2, 1  # the U-Net's stem does not stride
    want = convert(source.backbone, init).eval()(grey.expand(-1, 3, -1, -1, -1))
    got = network.network.backbone.eval()(grey)[-1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert (count(network, FlatConv3d) > 0) == (init != "i3d")
    assert not network.network.decode_head.convs[0].conv.weight.isnan().any()


@pytest.mark.parametrize("init", ["acs", "2.5d"])
def test_what_flat_kernels_save_is_a_native_network_of_the_same_answers(init, tmp_path):
    torch.save(randomise(ResNet2D(18, base_channels=4)).state_dict(), tmp_path / "image.pt")
    network = initialise(segmenter(), init, tmp_path / "image.pt").eval()
    save_weights(network, tmp_path / "model.pt")
    native = segmenter(seed=2)
    load_weights(native, tmp_path / "model.pt")
    x = torch.randn(1, 1, 24, 32, 16)
    with torch.inference_mode():
        torch.testing.assert_close(native.eval()(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_networks_are_read(name, tmp_path):
    torch.save(getattr(torchvision.models, name)().state_dict(), tmp_path / "image.pth")
    with torch.device("meta"):
        network = ResNet3D(int(name[6:]))
    network.to_empty(device="cpu")
    report = load_pretrained(network, tmp_path / "image.pth", conversion="i3d")
    kernels = [n for n, t in network.state_dict().items() if t.dim() == 5]
    assert sorted(report.inflated) == sorted(kernels)
    assert report.folded == ["conv1.weight"]
    assert sorted(report.matched + report.inflated) == sorted(network.state_dict())
    assert set(report.skipped) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("init", "network"),
    [
        ("i3d", lambda: ResNet3DClassifier(18, 2, base_channels=4)),
        ("acs", lambda: NoduleFCN(base_channels=4)),
        ("2.5d", lambda: DepthFirst(ResNet3DClassifier(18, 2, base_channels=4), restore=False)),
    ],
)
def test_every_network_with_this_encoder_takes_them(init, network, tmp_path):
    torch.save(ResNet2D(18, base_channels=4).state_dict(), tmp_path / "image.pt")
    network = initialise(network(), init, tmp_path / "image.pt").eval()
    with torch.inference_mode():
        assert network(torch.randn(1, 1, 16, 16, 16)).isfinite().all()


def test_the_wrong_dimension_or_depth_of_a_file_is_told(encoder, tmp_path):
    torch.save(ResNet2D(18, base_channels=4).state_dict(), tmp_path / "image.pt")
    with pytest.raises(
        ValueError, match=r"image\.pt: is a 2D network's file .*; say how its kernels become 3D, init 'i3d'"
    ):
        initialise(segmenter(), "vdt", tmp_path / "image.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt: is a 3D network's file .* but 'acs' converts 2D ones"):
        initialise(segmenter(), "acs", encoder[0])
    torch.save(ResNet2D(34, base_channels=8).state_dict(), tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"of the file \(depth 34, here 18; base_channels 8, here 4\)$"):
        initialise(segmenter(), "i3d", tmp_path / "deeper.pt")


# Video and other medical networks


def test_a_video_resnet_of_torchvision_gives_its_own_maps(tmp_path):
    theirs = randomise(torchvision.models.video.r3d_18()).eval()
    torch.save(theirs.state_dict(), tmp_path / "r3d_18.pth")
    network = ResNet3D(18, in_channels=3, depth_stride=True)
    report = load_pretrained(network, tmp_path / "r3d_18.pth")
    assert report.adapted == {"conv1.weight": "filled up with zeros from 3 to 7 taps along depth"}
    assert len(report.matched) == len(network.state_dict()) - 1
    network.conv1.stride, network.maxpool = (1, 2, 2), torch.nn.Identity()  # as theirs
    x = torch.randn(1, 3, 8, 32, 32)
    with torch.inference_mode():
        want = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(theirs.stem(x)))))
        torch.testing.assert_close(network.eval()(x)[-1], want, rtol=1e-4, atol=1e-3 * want.abs().max().item())


def test_kinetics_takes_the_video_files_with_their_rgb_stems(tmp_path):
    source = randomise(ResNet3DClassifier(18, 9, base_channels=4, in_channels=3))
    plain = {k.removeprefix("backbone.").removeprefix("head."): v for k, v in source.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet-18", "state_dict": plain, "optimizer": {"state": {}}}, tmp_path / "k.pth")
    network = initialise(segmenter(), "kinetics", tmp_path / "k.pth")
    folded = plain["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(network.network.backbone.conv1.weight.data, folded)
    thin = {**plain, "stem.0.weight": plain["conv1.weight"][:, :, 2:5]}
    del thin["conv1.weight"]
    torch.save(thin, tmp_path / "thin.pth")
    network = initialise(segmenter(), "kinetics", tmp_path / "thin.pth")
    torch.testing.assert_close(network.network.backbone.conv1.weight.data[:, :, 2:5], folded[:, :, 2:5])
    assert not network.network.backbone.conv1.weight[:, :, :2].any()


@pytest.mark.parametrize(("depth", "shortcut", "bias"), [(18, "A", True), (50, "B", False), (50, "B", True)])
def test_medicalnet_takes_monais_layout_and_answers_as_monais_resnet(depth, shortcut, bias, tmp_path):
    layers = {18: ("basic", [2, 2, 2, 2]), 50: ("bottleneck", [3, 4, 6, 3])}[depth]
    theirs = MonaiResNet(
        *layers, [4, 8, 16, 32], spatial_dims=3, n_input_channels=1, conv1_t_size=7, conv1_t_stride=2,
        shortcut_type=shortcut, bias_downsample=bias, feed_forward=False,
    )  # fmt: skip
    randomise(theirs).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "m.pth")
    network = ResNet3DClassifier(depth, 2, base_channels=4, depth_stride=True, shortcut=shortcut)
    initialise(network, "medicalnet", tmp_path / "m.pth")
    x = torch.randn(1, 1, 17, 33, 40)
    with torch.inference_mode():
        want, got = theirs(x), network.backbone.eval()(x)[-1].mean((2, 3, 4))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_shortcuts_of_type_a_let_the_gradient_through():
    network = randomise(ResNet3D(18, base_channels=4, shortcut="A"))
    for layer in (network.layer2, network.layer3, network.layer4):
        torch.nn.init.zeros_(layer[0].bn2.weight)  # the other branch is shut: layer1 learns by the shortcuts alone
        torch.nn.init.zeros_(layer[1].bn2.weight)
    network(torch.randn(2, 1, 8, 32, 32))[-1].square().sum().backward()
    assert network.layer1[0].conv1.weight.grad.abs().sum() > 0


def test_genesis_fills_its_own_network_all_but_the_last_layer(tmp_path):
    source = randomise(GenesisUNet3D(1, base_channels=4))
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "optimizer_state_dict": {}}, tmp_path / "Genesis_Chest_CT.pt")
    network = DepthFirst(GenesisUNet3D(3, base_channels=4))
    last = network.network.out_tr["final_conv"].weight.clone()
    initialise(network, "genesis", tmp_path / "Genesis_Chest_CT.pt")
    expected = {**source.state_dict(), "out_tr.final_conv.weight": last}
    filled = network.network.state_dict()
    assert all(torch.equal(filled[name], expected[name]) for name in filled if name != "out_tr.final_conv.bias")
    other = {name: tensor for name, tensor in state.items() if "up_tr64.up_conv" not in name}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"2 tensors differ: up_tr64\.up_conv\.weight is in the network only"):
        initialise(network, "genesis", tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("init", "network", "options", "sentence"),
    [
        ("vdt", GenesisUNet3D, {"num_classes": 2}, "genesis.yaml makes one for 'genesis' alone"),
        ("i3d", LesionDetector, {"depth": "18ba"}, "fills a ResNet3D, which LesionDetector does not have; use 's"),
        (
            "medicalnet",
            ResNet3D,
            {"depth": 18},
            r"depth 18 needs shortcut 'A', got 'B'; add configs/medicalnet\.yaml to",
        ),
        (
            "medicalnet",
            ResNet3D,
            {"depth": 50, "shortcut": "A"},
            r"needs shortcut 'B', got 'A'; leave configs/medicalnet",
        ),
    ],
)
def test_an_init_for_another_network_is_refused(init, network, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        initialise(network(**options, base_channels=4), init, "weights.pt")


def test_the_norm_is_that_of_the_file_and_from_scratch_one_that_small_batches_bear(tmp_path):
    path = tmp_path / "encoder.pt"
    assert pick_norm("scratch", None) == "instance"
    for norm in ("batch", "group", "instance"):
        save_weights(ResNet3D(18, base_channels=4, norm=norm), path)
        assert pick_norm("vdt", path) == norm
    torch.save(ResNet3D(18, base_channels=4).state_dict(), path)  # without what these packages write beside
    assert pick_norm("vdt", path) == "batch"


def test_a_resnets_file_is_refused_for_a_detector_in_a_sentence(encoder):
    detector = LesionDetector("18ba", base_channels=4, pyramid_channels=8, head_channels=8)
    with pytest.raises(ValueError, match=r"holds a ResNet, .* pre-train a P3D with configs/p3d\.yaml of imagenet_vdt"):
        initialise(detector, "vdt", encoder[0])

import pytest
import torch
from torch import nn

from networks import P3D, LesionDetector, P3DClassifier, load_pretrained
from tests.support.network_checks import randomise


def narrow(depth="18ba", **arguments):
    return P3D(depth, **{"base_channels": 4, **arguments})


@pytest.mark.parametrize("depth", [18, 63, "18ba", "34ba"])
def test_channels_and_reductions_describe_the_maps(depth):
    network = narrow(depth)
    maps = network(torch.randn(1, 9, 64, 96))
    assert [m.shape[1] for m in maps] == network.channels
    assert [(64 // m.shape[2], 96 // m.shape[3]) for m in maps] == network.reductions


@pytest.mark.parametrize(
    ("depth", "center", "group"),
    [
        pytest.param(18, 16_032_704, 16_067_264, id="18"),
        pytest.param(63, 27_281_728, 27_316_288, id="63"),
        pytest.param(131, 49_624_896, 49_659_456, id="131"),
        pytest.param(199, 68_028_736, 68_063_296, id="199"),
        pytest.param("18ba", 15_257_536, 15_266_176, id="18ba"),
        pytest.param("34ba", 28_346_816, 28_355_456, id="34ba"),
    ],
)
def test_number_of_parameters_is_the_published_one(depth, center, group):
    with torch.device("meta"):
        networks = [P3D(depth, conversion=c) for c in ("center", "group")]
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [center, group]


def test_three_slices_have_the_counted_number_of_parameters():
    with torch.device("meta"):
        network = P3D(63, conversion="group", slices=3)
    assert sum(p.numel() for p in network.parameters()) == 27_293_248


@pytest.mark.parametrize(
    ("depth", "letters"), [(63, "ABC ABCA BCABCA BCA"), ("18ba", "AB CA BC AB")], ids=["63", "18ba"]
)
def test_letters_of_the_blocks_take_turns_through_the_whole_network(depth, letters):
    network = narrow(depth)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    names = {(False, False): "A", (True, True): "B", (False, True): "C"}
    assert " ".join("".join(names[b.parallel, b.residual] for b in stage) for stage in stages) == letters


def test_group_transform_is_the_weighted_sum_of_the_slices():
    transform = narrow(conversion="group").groupconv_2
    nn.init.normal_(transform.weight)
    x = torch.randn(2, 8, 9, 5, 6)
    depthwise = nn.functional.conv3d(x, transform.weight[:, :, None].transpose(1, 2).reshape(8, 1, 9, 1, 1), groups=8)
    torch.testing.assert_close(transform(x), torch.einsum("cd,ncdhw->nchw", transform.weight[:, :, 0, 0], x))
    torch.testing.assert_close(transform(x), depthwise[:, :, 0])


def test_new_group_transform_is_the_centre_slice():
    network = narrow(conversion="group")
    for i, channels in enumerate(network.channels, 1):
        x = torch.randn(1, channels, 9, 3, 4)
        assert torch.equal(network.get_submodule(f"groupconv_{i}")(x), x[:, :, 4])


def test_stem_sees_each_slice_by_itself_and_depth_is_never_strided():
    network = narrow(conversion="group")
    x = torch.randn(1, 1, 9, 32, 32)
    y = x.clone()
    y[:, :, 3] += 1
    changed = (network.conv1_custom(x) != network.conv1_custom(y)).any(dim=1).any(dim=-1).any(dim=-1)[0]
    assert changed.tolist() == [i == 3 for i in range(9)]
    assert network.layer4(network.layer3(network.layer2(network.layer1(network.maxpool(network.conv1_custom(x)))))
                          ).shape[2] == 9  # fmt: skip


@pytest.mark.parametrize("conversion", ["center", "group"])
def test_every_slice_reaches_the_deepest_map(conversion):
    network, x = randomise(narrow(63, conversion=conversion)), torch.randn(1, 1, 9, 32, 32, requires_grad=True)
    network(x)[-1].sum().backward()
    assert (x.grad.abs().sum(dim=(0, 1, 3, 4)) > 0).all()


def test_pools_of_p3d_keep_the_key_slice_in_the_centre():
    network = narrow()
    x = torch.arange(9.0).expand(1, 1, 1, 1, 9).permute(0, 1, 4, 2, 3)
    once = network.pool(x)
    twice = network.pool(once)
    assert [t.shape[2] for t in (once, twice, network.last_pool(twice))] == [5, 3, 1]
    assert once[0, 0, 2, 0, 0] == 5  # the largest of slices 3, 4 and 5
    assert twice[0, 0, 1, 0, 0] == 7  # of 1 to 7
    assert network.last_pool(twice)[0, 0, 0, 0, 0] == 8


@pytest.mark.parametrize(
    ("conversion", "slices"), [*(("group", n) for n in (1, 3, 7, 12)), *(("center", n) for n in (9, 12, 17))]
)
def test_mp3d_takes_any_number_of_slices_and_p3d_nine_or_more(conversion, slices):
    maps = narrow(conversion=conversion, slices=slices)(torch.randn(1, slices, 32, 32))
    assert [m.dim() for m in maps] == [4] * 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"depth": 50}, "depth must be one of .*, got 50"),
        ({"conversion": "crop"}, "conversion must be one of .*, got 'crop'"),
        ({"slices": 7}, "slices must be at least 9 with conversion 'center'.* got 7"),
        ({"slices": 0, "conversion": "group"}, "slices must be at least 1; got 0"),
    ],
)
def test_wrong_argument_is_named_with_its_value(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        narrow(**arguments)


def test_input_of_another_number_of_slices_is_refused():
    with pytest.raises(ValueError, match="built for 9 slices, got an input of 3"):
        narrow(conversion="group")(torch.randn(1, 3, 32, 32))


# Weights


def test_weights_move_between_p3d_and_mp3d(tmp_path):
    torch.save(randomise(narrow(conversion="group")).state_dict(), tmp_path / "mp3d.pt")
    report = load_pretrained(narrow(), tmp_path / "mp3d.pt")
    assert report.skipped == {f"groupconv_{i}.weight": "P3D has no such layer" for i in range(1, 5)}
    assert report.left_random == []


def test_checkpoint_of_three_slices_without_group_convolution_gives_centre_cropping(tmp_path):
    source = randomise(narrow(conversion="group", slices=3))
    weights = {f"backbone.{k}": v.half() for k, v in source.state_dict().items() if "groupconv" not in k}
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in weights.items()}, "meta": {"epoch": 12}}, tmp_path / "c.pth"
    )
    network = randomise(narrow(conversion="group"), seed=1)
    report = load_pretrained(network, tmp_path / "c.pth")
    assert report.centred == [f"groupconv_{i}.weight" for i in range(1, 5)]
    assert report.left_random == []
    assert len(report.matched) == len(weights)
    assert "not in the file, set to the centre slice: groupconv_1.weight" in str(report)
    x = torch.randn(1, 1, 9, 32, 32)
    cropped = narrow(conversion="group")
    cropped.load_state_dict({k.removeprefix("backbone."): v.float() for k, v in weights.items()}, strict=False)
    for name in ("groupconv_1", "groupconv_2", "groupconv_3", "groupconv_4"):
        setattr(cropped, name, CentreCrop())
    for a, b in zip(network(x), cropped(x), strict=True):
        assert torch.equal(a, b)


class CentreCrop(nn.Module):
    def forward(self, x):
        return x[:, :, 4]


def test_encoder_of_another_family_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(4, 1, 7, 7, 7), "bn1.weight": torch.zeros(4)}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"conv1\.weight is in the file only"):
        load_pretrained(narrow(), tmp_path / "resnet.pt")


@pytest.mark.parametrize("depth", ["18ba", 18])
def test_a_p3d_trained_on_images_starts_a_detector_but_for_its_group_transforms(depth, tmp_path):
    torch.manual_seed(0)
    classifier = P3DClassifier(depth, 5, base_channels=4)
    logits = classifier(torch.randn(2, 1, 3, 64, 64))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    learnt = [p for p in classifier.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learnt)  # none is unused, which several processes would refuse
    torch.save(classifier.backbone.state_dict(), tmp_path / "encoder.pt")
    for slices in (9, 3):
        detector = LesionDetector(depth, base_channels=4, pyramid_channels=8, head_channels=8, slices=slices)
        report = load_pretrained(detector, tmp_path / "encoder.pt")
        assert len(report.centred) == (4 if slices == 9 else 0)
        assert torch.equal(detector.backbone.layer4[0].conv2.weight, classifier.backbone.layer4[0].conv2.weight)

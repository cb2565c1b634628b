import torch

from networks import ResNet3DClassifier
from tests.support.network_checks import randomise


def narrow(**arguments):
    return ResNet3DClassifier(18, 5, base_channels=8, **arguments)


def test_logits_are_the_linear_layer_of_the_mean_over_the_last_map():
    network = randomise(narrow()).eval()
    x = torch.randn(2, 3, 48, 64)
    (last,) = network.backbone(x)
    want = last.mean((2, 3, 4)) @ network.head.fc.weight.T + network.head.fc.bias
    torch.testing.assert_close(network(x), want)


def test_dropout_acts_on_pooled_features_while_training_only():
    network = randomise(narrow(dropout=0.5, norm="group"))
    seen = []
    network.head.dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    x = torch.randn(2, 3, 32, 32)
    network(x)
    network.eval()(x)
    (before, after), (same, again) = seen
    kept = after != 0
    assert 0 < kept.sum() < (before != 0).sum()
    torch.testing.assert_close(after[kept], 2 * before[kept])
    assert torch.equal(same, again)


def test_names_are_the_published_ones():
    names = list(narrow().state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "head"}
    assert [name for name in names if name.startswith("head")] == ["head.fc.weight", "head.fc.bias"]
    assert names[0] == "backbone.conv1.weight"

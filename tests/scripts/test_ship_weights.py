import hashlib
import json

import pytest
import torch
from ship_weights import ship

from networks import ResUNet3D, read_checkpoint
from vdt_workflows.training.checkpoints import load_weights, read_provenance, save_weights


@pytest.fixture
def trained(tmp_path):
    """A small network as training leaves it."""
    network = ResUNet3D(2, base_channels=4, norm="batch", deep_supervision=1)
    save_weights(network, tmp_path / "model.pt", {"depth": 18})
    record = {"depth": 18, "_run_": {"command": "/home/me/x", "training": ["/home/me/1.nii"], "epochs": 3, "seed": 0}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "card.md").write_text("---\nuse: x\nsha256:\n  model.pt: old\n---\n\n# mine\n")
    return network, tmp_path


def test_kernels_are_halved_what_serves_training_alone_goes_and_the_card_gets_the_hashes(trained):
    network, root = trained
    ship(str(root / "model.pt"), str(root / "mine"), flips=[[0]])
    whole, shipped = network.state_dict(), read_checkpoint(root / "mine" / "model.pt")
    assert {name for name in whole if name not in shipped} == {n for n in whole if n.startswith("side_heads.")} != set()
    for name, tensor in shipped.items():
        assert torch.equal(tensor, whole[name].half() if tensor.dim() > 1 else whole[name]), name
    assert read_provenance(root / "mine" / "model.pt") == {"depth": 18}
    load_weights(ResUNet3D(2, base_channels=4, norm="batch"), root / "mine" / "model.pt")
    record = json.loads((root / "mine" / "run.json").read_text())
    assert record == {"depth": 18, "flips": [[0]], "_run_": {"epochs": 3, "seed": 0}}
    hashes = {n: hashlib.sha256((root / "mine" / n).read_bytes()).hexdigest() for n in ("model.pt", "run.json")}
    lines = "".join(f"  {name}: {value}\n" for name, value in hashes.items())
    assert (root / "mine" / "card.md").read_text() == f"---\nuse: x\nsha256:\n{lines}---\n\n# mine\n"


def test_kernels_too_large_for_half_precision_are_refused(trained):
    network, root = trained
    network.backbone.conv1.weight.data[0] = 1e6
    save_weights(network, root / "model.pt")
    with pytest.raises(ValueError, match=r"conv1\.weight has values up to 1e\+06, too large for half precision"):
        ship(str(root / "model.pt"), str(root / "mine"))

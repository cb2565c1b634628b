"""Networks as `torch.export` programs and ONNX models with free sizes."""

from __future__ import annotations

import pytest
import torch

from networks import DepthFirst, NoduleFCN, ResNet3DClassifier, ResUNet3D

NETWORKS = {
    "unet": (lambda: DepthFirst(ResUNet3D(3, depth=18, base_channels=4)), (34, 40, 48), (19, 33, 21)),
    "fcn": (lambda: DepthFirst(NoduleFCN(2, depth=18, base_channels=4)), (16, 16, 16), (19, 33, 21)),
    "classifier": (
        lambda: DepthFirst(ResNet3DClassifier(18, 2, base_channels=4, depth_stride=True), restore=False),
        (72, 66, 80),
        (35, 64, 41),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_exported_networks_answer_as_the_network_on_other_sizes(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    make, example, other = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    size = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3, 4)}
    program = torch.export.export(network, (torch.randn(2, 1, *example),), dynamic_shapes=(size,))
    torch.onnx.export(program, (), f=str(tmp_path / "model.onnx"), dynamo=True, external_data=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for shape in ((1, 1, *example), (1, 1, *other), (2, 1, 48, 48, 48)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = network(x)
            torch.testing.assert_close(program.module()(x), expected, atol=1e-4, rtol=0)
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(answer), expected, atol=1e-4, rtol=0)

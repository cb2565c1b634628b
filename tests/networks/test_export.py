"""Networks as TorchScript, as `torch.export` programs, and in ONNX Runtime, with free sizes."""

from collections.abc import Callable

import pytest
import torch

from networks import P3D, DepthFirst, NoduleFCN, ResNet3DClassifier, ResUNet3D
from tests.support.network_checks import as_list

NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], list[tuple[int, ...]]]] = {  # the first size is the example
    "unet": (
        lambda: DepthFirst(ResUNet3D(3, depth=18, base_channels=4)),
        [(2, 1, 34, 40, 48), (1, 1, 19, 33, 21), (1, 1, 48, 32, 32)],
    ),
    "fcn": (
        lambda: DepthFirst(NoduleFCN(2, depth=18, base_channels=4)),
        [(2, 1, 16, 16, 16), (1, 1, 19, 33, 21), (1, 1, 24, 16, 32)],
    ),
    "classifier": (
        lambda: DepthFirst(ResNet3DClassifier(18, 2, base_channels=4, depth_stride=True), restore=False),
        [(2, 1, 72, 66, 80), (1, 1, 35, 64, 41), (1, 1, 48, 48, 48)],
    ),
    "p3d": (lambda: P3D("18ba", base_channels=4), [(2, 9, 64, 64), (1, 9, 96, 64), (1, 9, 64, 128)]),
}
# The detector: test_detector.py


def compare(network: torch.nn.Module, exported: Callable, sizes: list[tuple[int, ...]]) -> None:
    """Hold what `exported` answers to the network's answer, in float32, on random volumes."""
    for size in sizes:
        x = torch.randn(size)
        with torch.no_grad():
            expected, answer = as_list(network(x)), as_list(exported(x))
        assert len(answer) == len(expected)
        for got, wanted in zip(answer, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(got), wanted, atol=1e-4, rtol=0)


def make(name: str) -> tuple[torch.nn.Module, list[tuple[int, ...]]]:
    torch.manual_seed(0)
    build, sizes = NETWORKS[name]
    return build().eval(), sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_scripted_networks_answer_as_the_network(name, tmp_path):
    network, sizes = make(name)
    torch.jit.script(network).save(tmp_path / "model.ts")
    compare(network, torch.jit.load(tmp_path / "model.ts"), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_exported_networks_answer_as_the_network_on_other_sizes(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, sizes = make(name)
    example = torch.randn(sizes[0])
    free = {axis: torch.export.Dim.DYNAMIC for axis in range(example.ndim) if axis != 1}
    program = torch.export.export(network, (example,), dynamic_shapes=(free,))
    compare(network, program.module(), sizes)
    torch.onnx.export(program, (), f=str(tmp_path / "model.onnx"), dynamo=True, external_data=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (taken,) = session.get_inputs()
    compare(network, lambda x: session.run(None, {taken.name: x.numpy()}), sizes)

"""What only a GPU shows. Runs without the rest of the suite: pytest -m gpu --noconftest tests/gpu."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from monai.inferers import SlidingWindowInferer
from torch.nn.parallel import DistributedDataParallel

from networks import NoduleFCN, ResNet2DClassifier, ResNet3DClassifier, ResUNet3D
from vdt_transforms.vdt import drift_slices, interpolate_slices

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
MODELS = {
    "classifier": (lambda: ResNet3DClassifier(18, 5, base_channels=16), (4, 1, 3, 64, 64)),
    "group norm": (lambda: ResNet3DClassifier(18, 5, base_channels=16, norm="group"), (4, 1, 3, 64, 64)),
    "2D twin": (lambda: ResNet2DClassifier(18, 5, base_channels=16), (4, 1, 3, 64, 64)),
    "U-Net": (lambda: ResUNet3D(4, 18, base_channels=16, norm="instance"), (2, 1, 16, 64, 64)),
    "nodule network": (lambda: NoduleFCN(2, 18, base_channels=16), (2, 1, 32, 32, 32)),
}


@pytest.fixture(autouse=True)
def plain_arithmetic():
    """No TF32: its ten bits would hide an error of ours."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def make(name):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build(), torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_gives_the_cpu_s_logits_and_gradients(name):
    network, x = make(name)
    network, x = network.double().eval(), x.double()  # in float32, ReLUs near zero flip and gradients differ by 0.4 %
    twin = copy.deepcopy(network).to(CUDA)
    results = []
    for model, data in ((network, x), (twin, x.to(CUDA))):
        logits = model(data)
        logits.square().mean().backward()
        results.append([logits.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        scale = ours.abs().max().item() + 1e-6
        assert (ours - theirs).abs().max().item() < 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_trains_with_finite_losses_and_gradients(name, dtype):
    network, x = make(name)
    network.to(CUDA, memory_format=torch.channels_last_3d if name != "2D twin" else torch.contiguous_format)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            logits = network(x.to(CUDA))
        target = torch.zeros((len(x), *logits.shape[2:]), dtype=torch.long, device=CUDA)
        loss = F.cross_entropy(logits.float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert losses[-1] < losses[0]


def test_ddp_of_one_process_trains_as_the_network_alone(tmp_path):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        network, x = make("group norm")
        alone, shared = copy.deepcopy(network).to(CUDA), DistributedDataParallel(network.to(CUDA), device_ids=[0])
        for model in (alone, shared):
            model(x.to(CUDA)).square().mean().backward()
        for one, other in zip(alone.parameters(), shared.module.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)  # cudnn's sums are not in a fixed order
    finally:
        torch.distributed.destroy_process_group()


def test_sliding_windows_give_the_same_segmentation_on_both():
    network, _ = make("U-Net")
    network.eval()
    volume = torch.randn(1, 1, 40, 80, 80)
    infer = SlidingWindowInferer((16, 64, 64), overlap=0.5)
    with torch.no_grad():
        ours, theirs = infer(volume, network), infer(volume.to(CUDA), network.to(CUDA)).cpu()
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.999  # logits that are level to rounding may flip


def test_slices_are_interpolated_and_moved_as_on_the_cpu():
    volumes, rates = torch.rand(2, 1, 3, 16, 16), torch.tensor([[0.05, -0.03, 0.1, 0.05], [0.0, 0.0, -0.1, 0.0]])
    ours = drift_slices(interpolate_slices(volumes, 7), rates)
    theirs = drift_slices(interpolate_slices(volumes.to(CUDA), 7), rates.to(CUDA)).cpu()
    assert torch.allclose(ours, theirs, atol=1e-4)

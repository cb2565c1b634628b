"""What the network tests ask of every network alike."""

import copy
import io
import pickle
import warnings

import torch

NORMS = ("batch", "group", "instance")


def as_list(output):
    return list(output) if isinstance(output, list | tuple) else [output]


def count(network, kind):
    return sum(isinstance(module, kind) for module in network.modules())


def randomise(network, seed=0):
    """Give every tensor a value of its own: scales and statistics too, which start out alike in all layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.3 * noise.abs())
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(0.2 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
    return network


def probe_loss(output, seed=0):
    """A loss that depends on each voxel differently: the plain mean of a batch-normed map has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    return sum((y * torch.randn(y.shape, generator=generator)).sum() for y in as_list(output))


def assert_every_parameter_gets_a_gradient(network, x):
    network.zero_grad()
    output = network(x)
    assert all(y.isfinite().all() for y in as_list(output))
    probe_loss(output).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def scripted_and_saved(network, x):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates scripting, which MONAI's ckpt_export still does
        torch.jit.save(torch.jit.script(network), file)
        file.seek(0)
        return torch.jit.load(file)


COPIES = {
    "pickled": lambda network, x: pickle.loads(pickle.dumps(network)),
    "deep-copied": lambda network, x: copy.deepcopy(network),
    "scripted": scripted_and_saved,
    "exported": lambda network, x: torch.export.export(network, (x,)).module(),
}


def assert_copy_answers_alike(network, x, how):
    network = randomise(network).eval()
    with torch.no_grad():
        want = as_list(network(x))
        got = as_list(COPIES[how](network, x)(x))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def assert_compiled_step_is_the_eager_step(network, x):
    """One step of training under torch.compile gives eager's loss, gradients, weights and running statistics.

    In float64: in float32 another order of sums moves a few values across a ReLU's edge.
    """
    network, x = randomise(network).double().train(), x.double()
    steps = []
    for compiled in (False, True):
        own = copy.deepcopy(network)
        loss = probe_loss((torch.compile(own, backend="aot_eager") if compiled else own)(x))
        loss.backward()
        gradients = [p.grad for p in own.parameters()]
        torch.optim.SGD(own.parameters(), 0.01).step()
        steps.append([loss.detach(), *gradients, *own.state_dict().values()])
    for eager, compiled in zip(*steps, strict=True):
        scale = max(1, eager.abs().max().item())
        torch.testing.assert_close(compiled / scale, eager / scale, rtol=0, atol=1e-8)

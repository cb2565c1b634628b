"""Turn a 2D network into a 3D one: inflation (I3D), axial-coronal-sagittal kernels (ACS), or flat kernels (2.5D).

Each method puts the K x K kernel of a 2D convolution into a K x K x K one:

- "i3d" repeats it along the depth axis and divides by K. A volume that is constant along depth is answered as its
  slice was. Training then moves every tap.
- "acs" splits the output channels in thirds: the first look at the volume from above (kernel 1 x K x K, in D, H, W),
  the second from the front (K x 1 x K), the last from the side (K x K x 1). Training moves the K x K values alone.
- "2.5d" makes the kernel flat, 1 x K x K, for every channel. Training moves the K x K values alone.

The taps of a flat kernel sit in the middle of where those of the 3D kernel would be, so that "acs" and "2.5d" kernels
written out with zeros (`expand`) give exactly what the flat ones give, at any stride, padding and dilation.

Sources: arXiv 1705.07750 (I3D), arXiv 1911.10477 (ACS; the split and the 2.5D form as in its published code).
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

from networks.layers import StemConv3d
from networks.resnet3d import check_choice

METHODS = ("i3d", "acs", "2.5d")
_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: nn.BatchNorm3d,
    nn.InstanceNorm2d: nn.InstanceNorm3d,
    nn.Dropout2d: nn.Dropout3d,
    nn.MaxPool2d: nn.MaxPool3d,
    nn.AvgPool2d: nn.AvgPool3d,
    nn.AdaptiveAvgPool2d: nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool2d: nn.AdaptiveMaxPool3d,
    nn.Upsample: nn.Upsample,
    nn.UpsamplingNearest2d: nn.Upsample,
}
_SIZES = ("kernel_size", "stride", "padding", "dilation", "output_size", "size", "scale_factor")


def planes(method: str, channels: int) -> Iterator[tuple[slice, int]]:
    """Say which output channels have kernels that are flat along which axis (0 is D, 1 is H, 2 is W)."""
    if method == "2.5d":
        yield slice(0, channels), 0
        return
    third, rest = divmod(channels, 3)
    start = 0
    for axis in range(3):
        stop = start + third + (axis < rest)
        if stop > start:
            yield slice(start, stop), axis
        start = stop


def to_3d(kernel: Tensor, method: str) -> Tensor:
    """Put 2D kernels (O, I, K, K) into 3D ones (O, I, K, K, K).

    Raises:
        ValueError: if `method` is not one of `METHODS`, or the kernels are not square 2D ones.
    """
    check_choice("method", method, METHODS)
    if kernel.dim() != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"kernel must have shape (O, I, K, K), got {tuple(kernel.shape)}")
    size = kernel.shape[-1]
    if method == "i3d":
        return kernel.unsqueeze(2).expand(-1, -1, size, -1, -1) / size
    full = kernel.new_zeros(*kernel.shape, size)
    for rows, axis in planes(method, kernel.shape[0]):
        full[rows].select(2 + axis, size // 2).copy_(kernel[rows])
    return full


def to_2d(kernel: Tensor, method: str) -> Tensor:
    """Take the 2D kernels (O, I, K, K) out of 3D ones (O, I, K, K, K): the way back of `to_3d`.

    It is exact for "acs" and "2.5d", and for "i3d" up to the rounding of K equal terms; on kernels that `to_3d` did not
    make it gives the nearest thing, the middle planes or the sum along depth.

    Raises:
        ValueError: if `method` is not one of `METHODS`, or the kernels are not cubic ones.
    """
    check_choice("method", method, METHODS)
    if kernel.dim() != 5 or len(set(kernel.shape[2:])) != 1:
        raise ValueError(f"kernel must have shape (O, I, K, K, K), got {tuple(kernel.shape)}")
    if method == "i3d":
        return kernel.sum(2)
    middle = kernel.shape[-1] // 2
    return torch.cat([kernel[rows].select(2 + axis, middle) for rows, axis in planes(method, kernel.shape[0])])


class FlatConv3d(nn.Conv3d):
    """3D convolution whose kernels are flat: what "acs" and "2.5d" train.

    The parameter `weight` has shape (O, I, 1, K, K). A state dict holds the kernels written out, (O, I, K, K, K), which
    an ordinary `Conv3d` takes and answers with the same values; it is read back exactly, and so are kernels of shape
    (O, I, K, K) and (O, I, 1, K, K).

    Args:
        conv: the `Conv3d` in whose place this one comes, for its sizes; with a cubic kernel.
        weight: kernels of shape (O, I, K, K).
        method: "acs" or "2.5d".
    """

    def __init__(self, conv: nn.Conv3d, weight: Tensor, method: str) -> None:
        super().__init__(**_sizes_of(conv), bias=False, device=torch.device("meta"))
        self.method = method
        self.weight = nn.Parameter(weight.detach().unsqueeze(2).clone(), requires_grad=conv.weight.requires_grad)
        self.bias = conv.bias
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C', D', H', W')."""
        if self.groups > 1 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return self._conv_forward(x, self._written_out(), self.bias)
        outputs = []
        for rows, axis in planes(self.method, self.out_channels):
            before = self.dilation[axis] * (self.kernel_size[axis] // 2)
            after = self.dilation[axis] * (self.kernel_size[axis] - 1) - before
            border = [0] * 6  # of the flat axis; negative where the 3D kernel's middle does not reach the border
            border[4 - 2 * axis : 6 - 2 * axis] = [int(self.padding[axis]) - before, int(self.padding[axis]) - after]
            padding = [0 if i == axis else p for i, p in enumerate(self.padding)]
            weight = self.weight[rows].movedim(2, 2 + axis)
            bias = None if self.bias is None else self.bias[rows]
            inside = F.pad(x, border) if any(border) else x
            outputs.append(F.conv3d(inside, weight, bias, self.stride, padding, self.dilation))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _written_out(self) -> Tensor:
        return to_3d(self.weight.squeeze(2), self.method)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._written_out() if keep_vars else self._written_out().detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        kernel = own.get(prefix + "weight", torch.empty(0))
        if kernel.dim() == 5 and len(set(kernel.shape[2:])) == 1:
            flat = to_2d(kernel, self.method)
            if not torch.equal(to_3d(flat, self.method), kernel):
                lists[-1].append(f"{prefix}weight has values outside the planes of {self.method!r}")
            kernel = flat
        if kernel.dim() == 4:
            own[prefix + "weight"] = kernel.unsqueeze(2)
        super()._load_from_state_dict(own, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        """Name the method beside the sizes."""
        return f"{super().extra_repr()}, method={self.method!r}"


def _sizes_of(conv: nn.Conv2d | nn.Conv3d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def convert(module_2d: nn.Module, method: str) -> nn.Module:
    """Make a 3D network of a 2D one, with its weights; the 2D one is left as it is.

    Convolutions become 3D by the method; 1 x 1 ones stay pointwise. Norms, pools, dropout and `nn.Upsample` become
    their 3D forms, with the same size, stride and padding on all three axes; other layers stay. What a `forward` does
    itself with two axes (`F.interpolate`, `F.pad`) cannot be seen from here and is not changed. State-dict names stay.
    With "acs" and "2.5d" the convolutions are `FlatConv3d`; `expand` makes them ordinary ones.

    Args:
        module_2d: network of (N, C, H, W), such as torchvision's ResNets.
        method: "i3d", "acs" or "2.5d" (see the module's text).

    Returns:
        The network of (N, C, D, H, W).

    Raises:
        ValueError: if `method` is unknown, or a layer has no 3D form, which names the layer.
    """
    check_choice("method", method, METHODS)
    return _map_layers(copy.deepcopy(module_2d), lambda layer, name: _layer_to_3d(layer, name, method))


def constrain(network: nn.Module, method: str) -> nn.Module:
    """Train a 3D network with flat kernels: put `FlatConv3d` in the place of every cubic convolution larger than one.

    Kernels that a conversion of the same method made keep their values. Others, which are random as a rule, keep their
    middle planes times the square root of K: the spread that Kaiming's rule gives to kernels of K x K taps.

    Args:
        network: network of (N, C, D, H, W); changed in place.
        method: "acs" or "2.5d".

    Returns:
        The network. Its state dict stays that of the native network.

    Raises:
        ValueError: if `method` is not one of these two.
    """
    check_choice("method", method, ("acs", "2.5d"))

    def change(layer: nn.Module, name: str) -> nn.Module:
        if not isinstance(layer, nn.Conv3d) or type(layer) not in (nn.Conv3d, StemConv3d):
            return layer
        if len(set(layer.kernel_size)) != 1 or layer.kernel_size[0] == 1:
            return layer
        kernel = layer.weight.detach()
        flat = to_2d(kernel, method)
        if not torch.equal(to_3d(flat, method), kernel):
            flat = flat * layer.kernel_size[0] ** 0.5
        return FlatConv3d(layer, flat, method)

    return _map_layers(network, change)


def expand(network: nn.Module) -> nn.Module:
    """Put ordinary convolutions in the place of every `FlatConv3d` of a network; its answers stay the same."""

    def change(layer: nn.Module, name: str) -> nn.Module:
        if not isinstance(layer, FlatConv3d):
            return layer
        new = nn.Conv3d(**_sizes_of(layer), bias=False)
        new.weight = nn.Parameter(layer._written_out().detach(), requires_grad=layer.weight.requires_grad)
        new.bias = layer.bias
        return new.train(layer.training)

    return _map_layers(network, change)


def _map_layers(module: nn.Module, change: Any, name: str = "") -> nn.Module:
    for child_name, child in module.named_children():
        setattr(module, child_name, _map_layers(child, change, f"{name}.{child_name}".lstrip(".")))
    return change(module, name)


def _layer_to_3d(layer: nn.Module, name: str, method: str) -> nn.Module:
    where = f"the layer {name or 'module_2d'!r}, {type(layer).__name__},"
    if type(layer) is nn.Conv2d:
        return _conv_to_3d(layer, where, method)
    if type(layer) in _COUNTERPARTS:
        for size in [s for s in _SIZES if getattr(layer, s, None) is not None]:
            setattr(layer, size, _cubic(getattr(layer, size), size, where))
        if getattr(layer, "divisor_override", None) is not None:
            raise ValueError(f"{where} has a divisor_override, for which no 3D form is known")
        if isinstance(layer, nn.Upsample):
            if layer.mode == "bicubic":
                raise ValueError(f"{where} is bicubic, which torch has in 2D alone; make it bilinear first")
            layer.mode = "trilinear" if layer.mode == "bilinear" else layer.mode
        layer.__class__ = _COUNTERPARTS[type(layer)]  # the same fields, for one axis more
        return layer
    if isinstance(layer, nn.Conv2d) or type(layer).__name__.endswith("2d"):
        raise ValueError(
            f"{where} has no 3D form here; known are Conv2d, {', '.join(c.__name__ for c in _COUNTERPARTS)}"
        )
    return layer


def _conv_to_3d(layer: nn.Conv2d, where: str, method: str) -> nn.Module:
    sizes = _sizes_of(layer)
    sizes |= {n: _cubic(sizes[n], n, where) for n in ("kernel_size", "stride", "padding", "dilation")}
    new = nn.Conv3d(**sizes, bias=False, device=torch.device("meta"))
    new.bias = layer.bias
    new.train(layer.training)
    kernel = layer.weight.detach()
    if method == "i3d":
        new.weight = nn.Parameter(to_3d(kernel, method).contiguous(), requires_grad=layer.weight.requires_grad)
        return new
    new.weight.requires_grad_(layer.weight.requires_grad)
    return FlatConv3d(new, kernel, "2.5d" if layer.kernel_size == (1, 1) else method)  # a point has one plane


def _cubic(size: Any, name: str, where: str) -> Any:
    if not isinstance(size, tuple):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"{where} has {name} {size}; only layers that treat both axes alike have a 3D form")
    return (size[0],) * 3

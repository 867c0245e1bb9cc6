"""Counts the kernels that a GPU would run, with their bytes and FLOPs, on the device "meta"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry


class Card(NamedTuple):
    """The speed of a GPU: bytes per second, FLOPs per second by type, and seconds from one kernel to the next."""

    bandwidth: float
    flops: dict[torch.dtype, float]
    launch: float = 3e-6


def card(terabytes: float, single: float, half: float) -> Card:
    """Returns a card that reaches 3/4 of its data sheet: TB/s, and dense TFLOPs of float32 (no TF32) and bfloat16."""
    rates = {torch.float32: single, torch.bfloat16: half, torch.float16: half, torch.float64: single / 2}
    return Card(0.75e12 * terabytes, {dtype: 0.75e12 * rate for dtype, rate in rates.items()})


CARDS = {
    "H100": card(3.35, 67, 989),
    "A100": card(2.04, 19.5, 312),
    "RTX 4090": card(1.01, 82.6, 165),
    "T4": card(0.32, 8.1, 65),
}


class Kernel(NamedTuple):
    """An operation that is issued, with the bytes that it must at least read and write."""

    name: str
    bytes: int
    flops: int
    dtype: torch.dtype

    def seconds(self, card: Card) -> float:
        """Returns the longest of three times: to launch the kernel, to move its bytes and to do its arithmetic."""
        return max(card.launch, self.bytes / card.bandwidth, self.flops / card.flops.get(self.dtype, torch.inf))


NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}
NOTHING |= {"lift_fresh", "promote_types", "scalar_tensor"}  # the last two run on the CPU, wherever the operands are
FILLS = {"new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
# These read, or add to, only the elements that an index names.
GATHERS = {"gather", "index_select", "index", "take", "embedding"}
SCATTERS = {"scatter", "scatter_add", "scatter_reduce", "index_add", "index_put", "_index_put_impl", "index_copy"}


class Counter(TorchDispatchMode):
    """Lists the kernels that are issued: one for each operation that is not a view and fills its result."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "kaf_layer":  # count the operations inside the package's operator
            with self:
                return OPDEFS[func._name.removesuffix(".default")]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        if not launches_nothing(func):
            packet = func.overloadpacket
            flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
            tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            dtype = tensors[0].dtype if tensors else torch.float32
            self.kernels.append(Kernel(packet.__name__, traffic(func, args, kwargs, result), flops, dtype))
        return result


def launches_nothing(func: Any) -> bool:
    """Returns whether an operation is a view or leaves its result unfilled."""
    view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
    return view or func.overloadpacket.__name__ in NOTHING


def traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Returns the bytes moved if each operand is read once and each result is written once."""
    name = func.overloadpacket.__name__.rstrip("_")
    read = {key: value for key, value in kwargs.items() if key != "out"}
    inputs = [value for value in tree_leaves((args, read)) if isinstance(value, Tensor)]
    outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
    written = sum(map(size_of, outputs))
    if name in FILLS:
        return written
    if name in GATHERS:
        return sum(map(size_of, inputs[1:])) + 2 * written
    if name in SCATTERS:
        # The places that are added to are read and written. An operation that is not in place copies its input.
        copied = 0 if func.overloadpacket.__name__.endswith("_") else 2 * size_of(inputs[0])
        return copied + sum(map(size_of, inputs[1:])) + 2 * max(map(size_of, inputs[1:]), default=0)
    if name in {"copy", "fill", "zero"}:
        inputs = inputs[1:]  # the old values are not read
    return sum(map(size_of, inputs)) + written


def size_of(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's elements. Those that an expanded or overlapping view repeats count once."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in strides) if tensor.numel() else 0
    return min(tensor.numel(), span) * tensor.element_size()


# From the lists of https://docs.pytorch.org/docs/stable/amp.html, those that are used here.
LOW = {F.linear, F.conv2d, F.conv3d, F.conv_transpose2d, torch.matmul, torch.bmm, torch.mm, torch.baddbmm, torch.einsum}
LOW |= {Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm, Tensor.mm, F.scaled_dot_product_attention}
HIGH = {F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, F.normalize, torch.cdist, torch.cumsum}
HIGH |= {Tensor.sum, torch.sum, Tensor.exp, torch.exp, Tensor.log, torch.log, Tensor.pow, Tensor.norm, Tensor.softmax}
WAITS = {torch.tensor, torch.as_tensor, Tensor.new_tensor, Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__}


class Device(TorchFunctionMode):
    """Does as PyTorch does on a GPU: fused attention and autocast. It also notes each call that would wait.

    Args:
        dtype: the type of autocast, or None for no autocast.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.off = 0
        self.waits: list[str] = []
        self.cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS:
            self.waits.append(func.__name__)
        if self.dtype is not None and not self.off and (func in LOW or func in HIGH):
            convert = partial(self._convert, dtype=self.dtype if func in LOW else torch.float32)
            args = tree_map(convert, args)
            kwargs = tree_map(convert, kwargs)
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def without_autocast(self, _: torch.device) -> Iterator[None]:
        """Replaces the package's function of this name, because torch.autocast does not support the device "meta"."""
        self.off += 1
        try:
            yield
        finally:
            self.off -= 1

    def _convert(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        # Autocast converts each weight only once.
        key = id(value)
        if key not in self.cast:
            self.cast[key] = value, value.to(dtype)
        return self.cast[key][1]


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Tensor:
    """Runs the kernel that PyTorch chooses on a GPU: for half precision without a mask, flash attention."""
    scale = options.get("scale")
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        columns = attn_mask.shape[-1]
        if any(stride % 8 for stride in attn_mask.stride()[:-1]):
            attn_mask = F.pad(attn_mask, (0, -columns % 8))[..., :columns]
        attn_mask = attn_mask.expand(*query.shape[:-1], columns)
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, scale=scale
    )[0]


def count(run: Callable[[], object], *, dtype: torch.dtype | None = None) -> tuple[list[Kernel], list[str]]:
    """Returns the kernels of a run on tensors of the device "meta", and the calls that would wait for a GPU.

    Args:
        run: the function to count.
        dtype: the type of autocast, or None for no autocast.
    """
    device = Device(dtype)
    with (
        patch("kaf_layer.checks._autocasts", lambda *_: device.dtype is not None),
        patch("kaf_layer.precision.is_autocasting", lambda _: device.dtype is not None and not device.off),
        patch("torch.get_autocast_dtype", lambda _: device.dtype),
        patch("kaf_layer.attention.without_autocast", device.without_autocast),
        patch("kaf_layer.diffusion.network.without_autocast", device.without_autocast),
        patch("kaf_layer.detection.sift.detector.without_autocast", device.without_autocast),
        patch("kaf_layer.losses.pcl.without_autocast", device.without_autocast),
        patch("kaf_layer.matching.matcher.without_autocast", device.without_autocast),
        patch("kaf_layer.matching.sinkhorn.without_autocast", device.without_autocast),
        Counter() as counter,
        device,
    ):
        run()
    return counter.kernels, device.waits


def floor(kernels: list[Kernel], card: Card) -> float:
    """Returns the least seconds that a card takes to run the kernels one after the other."""
    return sum(kernel.seconds(card) for kernel in kernels)

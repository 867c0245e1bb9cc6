"""Runs the package on a device that is no GPU but is named like one: tensors without values that know where they are.

python tests/fake_gpu.py

A tensor on another device is an error, and so is anything that needs a value. It is a script because PyTorch allows one
such device in a process. Its tensors are fake, since a CPU build of PyTorch has no CUDA, not even for fake ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from examples.unet import KAFUNet
from kaf_layer import KAFLayer, KAFPretrainingLoss, Keypoints, SIFTDetector, attach, match_keypoints
from kaf_layer.diffusion.network import Method
from kaf_layer.matching import KeypointMatcher

GPU = "gpu"
SIZE = (48, 32)


def register() -> None:
    """Makes PyTorch know the device."""

    class Guard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    class Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
        def is_available(self) -> bool:
            return True

        def has_primary_context(self, _: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    device: Any = ModuleType("torch.gpu")
    device.is_initialized = device.is_available = lambda: True
    device.current_device, device.device_count = lambda: 0, lambda: 1
    torch.utils.rename_privateuse1_backend(GPU)
    torch._register_device_module(GPU, device)
    torch._C._acc.register_python_privateuseone_device_guard(Guard())
    torch._C._acc.register_python_privateuseone_hook(Hooks())


def moved(module: nn.Module) -> nn.Module:
    """The module with all weights on the device; ``to`` would copy their values."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=GPU))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return module


def keypoints(batch: int = 2) -> Keypoints:
    positions, valid = torch.zeros(batch, 6, 2, device=GPU), torch.ones(batch, 6, dtype=torch.bool, device=GPU)
    return Keypoints(positions, valid, SIZE, descriptors=torch.zeros(batch, 6, 128, device=GPU))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device=GPU, requires_grad=True)


def run_layer(method: Method) -> Callable[[nn.Module], list[Tensor]]:
    def run(layer: Any) -> list[Tensor]:
        layer.diffusion.method = method
        return list(layer(zeros(2, 8, *SIZE), keypoints()))

    return run


def run_loss(loss: nn.Module) -> list[Tensor]:
    matches = match_keypoints(keypoints(), keypoints())
    return [loss(zeros(4, 8, 6, 4), torch.zeros(4, device=GPU), zeros(4, 6, 16), keypoints(4), matches).total]


def cases() -> dict[str, tuple[nn.Module, Callable[[nn.Module], list[Tensor]]]]:
    """Modules, and how each is run."""
    small: Any = {"embed_dim": 16, "depth": 2}
    convolutions = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    methods: tuple[Method, ...] = ("rows", "hybrid", "dense")
    layers = {method: (KAFLayer(8, num_heads=2, **small), run_layer(method)) for method in methods}
    return layers | {
        "UNet": (KAFUNet(width=4, levels=3, **small), lambda m: [m(zeros(2, 1, *SIZE), keypoints())]),
        "attached": (attach(convolutions, {"0": 8}, **small), lambda m: [m(zeros(2, 1, *SIZE), keypoints=keypoints())]),
        "SIFT": (SIFTDetector(20), lambda m: [m(zeros(2, 1, *SIZE)).descriptors]),
        "SIFT, no gradient": (SIFTDetector(20), lambda m: [m(zeros(2, 1, *SIZE).detach()).descriptors]),
        "matcher": (KeypointMatcher(16, depth=2), lambda m: [m(*[zeros(2, 6, 16), keypoints()] * 2)]),
        "loss": (KAFPretrainingLoss(8, 16), run_loss),
    }


def refuse(mistake: Callable[[], object]) -> None:
    """Checks that a mistake is an error, so that the device finds it in the package too."""
    try:
        with FakeTensorMode():
            mistake()
    except (RuntimeError, DataDependentOutputException):
        return
    raise AssertionError("a mistake was no error")


def main() -> None:
    register()
    refuse(lambda: zeros(2) + torch.zeros(2))
    refuse(lambda: zeros(1).item())
    for name, (module, run) in cases().items():
        with FakeTensorMode():
            results = run(moved(module))
            if not all(result.device.type == GPU for result in results):
                raise RuntimeError(f"{name} left the device")
            if any(result.requires_grad for result in results):
                torch.autograd.backward([result.sum() for result in results])
        sys.stdout.write(f"{name}: passed\n")


if __name__ == "__main__":
    main()

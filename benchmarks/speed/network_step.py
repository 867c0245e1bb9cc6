"""Measures what KAF layers add to a UNet's training step. ``layers.py --parts network`` runs it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common.measuring import compare, count_flops
from examples.unet import KAFUNet, UNetC2
from kaf_layer import Keypoints

NOTES = """Seconds of a training step (forward, cross-entropy, backward, SGD) of the KAF-UNet (32 channels, 6
transformer blocks, 512 keypoints, batch 2) and of UNet (c2), which has the same convolutions but no KAF layers."""


def network_step(
    keypoints: Keypoints, precision: AbstractContextManager[object], *, width: int, repeats: int
) -> dict[str, object]:
    """Compares a training step of the KAF-UNet with that of UNet (c2)."""
    (batch, _), size, device = keypoints.valid.shape, keypoints.image_size, keypoints.valid.device
    images = torch.randn(batch, 1, *size, device=device)
    labels = torch.randint(4, (batch, *size), device=device)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with precision:
            logits = model(images, keypoints)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    models = {"KAF-UNet": KAFUNet(width=width).to(device), "UNet (c2)": UNetC2(width=width).to(device)}
    steps = {name: partial(step, model, torch.optim.SGD(model.parameters(), lr=1e-3)) for name, model in models.items()}
    seconds = compare(steps, repeats=repeats)
    flops = {name: count_flops(run) for name, run in steps.items()}
    row: dict[str, object] = {f"{name}, s": value for name, value in seconds.items()}
    return row | {
        name: values["KAF-UNet"] / values["UNet (c2)"] for name, values in (("time", seconds), ("FLOPs", flops))
    }

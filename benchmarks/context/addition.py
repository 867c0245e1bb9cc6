"""Measures how fast an added map grows, behind a gain or a last convolution that starts at zero.

    python -m benchmarks.context.addition  # about three minutes on two cores

It trains UNets with KAF layers that add, on the task in task.py. It reports the size of the added map relative to the
features (root mean squares at the keypoints, largest of the layers) and the loss, next to the loss of the UNet without
layers. Both kinds of layers start as the exact identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import harness
from benchmarks.context.networks import ATTENTION, LEVELS, WIDTH
from benchmarks.context.networks import NETWORKS as LEARNERS
from benchmarks.context.task import IGNORED, Task, draw_task
from examples.unet import UNet
from kaf_layer import KAFLayer, KAFOutput, Keypoints
from kaf_layer.sampling import sample_keypoints


class ZeroConvolution(KAFLayer):
    """Addition without a gain: the last convolution starts at zero instead."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, fusion="add", **options)
        nn.init.ones_(self.gain).requires_grad_(False)
        for parameter in self.diffusion.conv2.parameters():
            nn.init.zeros_(parameter)


def with_layers(layer: type[KAFLayer], **options: Any) -> nn.Module:
    with torch.random.fork_rng():  # the other weights start as they do without layers
        layers = [layer(WIDTH * 2**i, **ATTENTION, **options) for i in range(LEVELS - 1)]
    return UNet(1, 2, width=WIDTH, layers=layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": LEARNERS["UNet"],
    "zero convolution": lambda: with_layers(ZeroConvolution),
    "gain": lambda: with_layers(KAFLayer, fusion="add"),
}


def watch(network: nn.Module) -> dict[nn.Module, float]:
    """Returns the ratio of added map to features in each KAF layer. Every forward pass updates it."""
    ratios: dict[nn.Module, float] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, Keypoints], output: KAFOutput) -> None:
        features, keypoints = inputs
        before, after = (sample_keypoints(x.detach(), keypoints)[keypoints.valid] for x in (features, output.features))
        ratios[layer] = float((after - before).square().mean().sqrt() / before.square().mean().sqrt())

    for module in network.modules():
        if isinstance(module, KAFLayer):
            module.register_forward_hook(note)
    return ratios


def grow(network: nn.Module, task: Task, *, steps: int, lr: float) -> list[tuple[float, float]]:
    """Trains, and returns the largest ratio and the loss of each step."""
    generator = torch.Generator().manual_seed(0)
    ratios, optimizer, history = watch(network), torch.optim.Adam(network.parameters(), lr=lr), []
    for _ in range(steps):
        part = task[torch.randint(len(task.images), (8,), generator=generator)]
        loss = F.cross_entropy(network(part.images, part.keypoints), part.labels, ignore_index=IGNORED)
        history.append((max(ratios.values(), default=0.0), loss.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps of training")
    parser.add_argument("--images", type=int, default=400, help="images to train on")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of Adam")
    options = parser.parse_args(arguments)
    task, histories = draw_task(options.images, seed=0), {}
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        histories[name] = grow(build(), task, steps=options.steps, lr=options.lr)
    rows = []
    for step in [s for s in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if s <= options.steps]:
        row: dict[str, object] = {"step": step}
        for name, history in histories.items():
            if name != "UNet":
                row[f"added / features, {name}"] = history[step - 1][0]
            row[f"loss, {name}"] = mean(loss for _, loss in history[max(0, step - 10) : step])
        rows.append(row)
    notes = (
        f"Adam {options.lr:g}, batch 8, seed 0. Sizes are root mean squares at the keypoints, the largest of the "
        "layers. The loss is the mean of the last 10 steps."
    )
    harness.report("addition", rows, notes=notes)


if __name__ == "__main__":
    main()

"""Measures the time of KAF layers and of SwinUNETR's encoder for a volume. ``layers.py --spatial-dims 3`` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.common.harness import Row
from benchmarks.common.measuring import compare
from benchmarks.common.networks import VOLUMETRIC, Network, backward, build_all

NAMES = ("KAF layers", "KAF-UNet's encoder", "SwinUNETR, embedding 24", "SwinUNETR")
TRAINED = 96  # the largest edge for a backward pass: at 128 SwinUNETR would save 16 GB
NOTES = """Seconds for one volume with the given number of voxels along each axis, and their ratio to those of the KAF
layers: medians of alternating runs. The networks are those of flops-3d.md with 20 self-attentions each. "KAF layers"
come on top of the convolutions around them. The KAF-UNet's encoder has both, and a Swin is a complete encoder."""


@torch.no_grad()
def infer(network: Network, inputs: tuple[object, ...]) -> None:
    network(*inputs)


def learn(network: Network, inputs: tuple[object, ...]) -> None:
    backward(network(*inputs))


def volume_stack(edge: int, *, attentions: int = 20, repeats: int, device: str) -> Iterator[Row]:
    with torch.device(device):
        networks, reasons = build_all({name: VOLUMETRIC[name] for name in NAMES}, attentions)
        inputs = {name: network.inputs(edge) for name, network in networks.items()}
    steps = {"forward": infer} | ({"forward+backward": learn} if edge <= TRAINED else {})
    for step, run in steps.items():
        runs = {name: partial(run, network, inputs[name]) for name, network in networks.items()}
        seconds = compare(runs, repeats=repeats)
        for name in networks:
            ratio = seconds[name] / seconds[NAMES[0]]
            yield {"volume": edge, "of": step, "network": name, "s": seconds[name], "times the KAF layers": ratio}
    for name, reason in reasons.items():
        yield {"volume": edge, "of": "-", "network": name, "s": reason, "times the KAF layers": "-"}

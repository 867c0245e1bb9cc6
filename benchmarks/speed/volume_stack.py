"""How long KAF layers take for a volume, beside the encoder of SwinUNETR: speed.py --spatial-dims 3 runs it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.common.harness import compare
from benchmarks.common.networks import VOLUMETRIC, Network, backward, build_all

NAMES = ("KAF layers", "KAF-UNet's encoder", "SwinUNETR, embedding 24", "SwinUNETR")
TRAINED = 96  # the longest edge of a volume that is trained on: at 128 SwinUNETR would save 16 GB
NOTES = """Seconds for one volume of as many voxels along each axis, and how many times those of the KAF layers:
medians of alternating runs. The networks are those of flops-3d.md, 20 self-attentions each. "KAF layers" come on top of
the convolutions around them; the encoder has both, and a Swin is an encoder by itself."""


@torch.no_grad()
def infer(network: Network, inputs: tuple[object, ...]) -> None:
    network(*inputs)


def learn(network: Network, inputs: tuple[object, ...]) -> None:
    backward(network(*inputs))


def volume_stack(edge: int, *, attentions: int = 20, repeats: int, device: str) -> Iterator[dict[str, object]]:
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

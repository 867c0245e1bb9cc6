"""Measures what it saves to fuse the map within KeypointDiffusion instead of afterwards.

python -m benchmarks.speed.fusion [--edges 512 128] [--batch 4] [--repeats 11]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.common.harness import parser, report
from benchmarks.common.measuring import DEVICE
from benchmarks.common.networks import WIDTH
from benchmarks.speed.passes import measure, random_keypoints
from kaf_layer import KeypointDiffusion

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
NOTES = """The diffusion network in training mode, with 512 keypoints, in float32. "afterwards": its map is concatenated
with the features by torch.cat, or multiplied by a gain for each channel and added to them. "at once": KeypointDiffusion
does the same itself. Times are medians of alternating runs. "saved" is what the forward pass keeps for the backward
pass, without the features."""


def fuse(fusion: str, layout: str, batch: int, edge: int, *, repeats: int) -> dict[str, object]:
    """Returns a row of the table."""
    torch.manual_seed(0)
    channels, size = WIDTH * 512 // edge, (edge, edge)
    diffusion = KeypointDiffusion(256, channels).to(DEVICE)
    keypoints = random_keypoints(batch, min(512, edge**2 // 4), edge)
    tokens = torch.randn(*keypoints.valid.shape, 256, device=DEVICE, requires_grad=True)
    features = torch.randn(batch, channels, *size, device=DEVICE).contiguous(memory_format=FORMATS[layout])
    features.requires_grad_()
    gain = torch.randn(channels, device=DEVICE, requires_grad=True)

    def afterwards() -> Tensor:
        diffused = diffusion(tokens, keypoints, size).contiguous(memory_format=FORMATS[layout])
        if fusion == "add":
            return torch.addcmul(features, gain.view(-1, 1, 1), diffused)
        return torch.cat([features, diffused], dim=1)

    def at_once() -> Tensor:
        return diffusion(tokens, keypoints, size, features=features, gain=gain if fusion == "add" else None)

    forwards: dict[str, Callable[[], Tensor]] = {"afterwards": afterwards, "at once": at_once}
    leaves = [tokens, features, gain, *diffusion.parameters()]
    quantities = measure(forwards, leaves, dtype=torch.float32, repeats=repeats)
    saved = {f"{name}, saved MiB": value / 2**20 for name, value in quantities.pop("saved").items()}
    row: dict[str, object] = {"fusion": fusion, "layout": layout, "map": f"{edge}x{edge}, {channels}", "batch": batch}
    for name in ("forward", "forward+backward"):
        seconds = quantities[name]
        row |= {f"{name}, at once, ms": 1e3 * seconds["at once"]}
        row |= {f"{name}, ratio": seconds["afterwards"] / seconds["at once"]}
    return row | saved


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("--edges", type=int, nargs="+", default=[512, 128], help="edges of the map")
    own.add_argument("--batch", type=int, default=4, help="number of maps in a batch")
    own.add_argument("--repeats", type=int, default=11, help="how often each run is timed; the median counts")
    options = own.parse_args(arguments)
    cases = product(("concat", "add"), FORMATS, (options.batch,), options.edges)
    report("fusion", (fuse(*case, repeats=options.repeats) for case in cases), notes=NOTES)


if __name__ == "__main__":
    main()

"""One quantity of every network in networks.py against the image's edge, on fake tensors: nothing is computed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product

from networks import NETWORKS, Network
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

EDGES = (128, 256, 352, 512, 768, 1024)
ATTENTIONS = (20, 100)


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, nargs="+", default=EDGES, help="of the images, in pixels; multiples of 16")
    parser.add_argument(
        "--attentions", type=int, nargs="+", default=ATTENTIONS, help="in all of a network; multiples of 4 from 8 on"
    )
    return parser.parse_args(arguments)


def sweep(
    measure: Callable[[Network, tuple[object, ...]], dict[str, float]],
    *,
    edges: Sequence[int],
    attentions: Sequence[int],
) -> list[dict[str, object]]:
    """A row for each network, number of self-attentions and measured quantity; a column for each edge."""
    rows = []
    for count, (name, build) in tqdm(list(product(attentions, NETWORKS.items())), unit="network"):
        with FakeTensorMode():
            network = build(count)
            values = [measure(network, network.inputs(edge)) for edge in edges]
        for quantity in values[0]:
            row: dict[str, object] = {"network": name, "attentions": count, "of": quantity}
            row |= {str(edge): value[quantity] for edge, value in zip(edges, values, strict=True)}
            rows.append(row | {"configuration": network.configuration})
    return rows

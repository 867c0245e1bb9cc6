"""One quantity of every network in networks.py against the image's edge, on fake tensors: nothing is computed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product

from networks import NETWORKS, VOLUMETRIC, Network
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

EDGES = {2: (128, 256, 352, 512, 768, 1024), 3: (64, 96, 128)}
ATTENTIONS = {2: (20, 100), 3: (20,)}


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spatial-dims", type=int, choices=(2, 3), default=2, help="3: of volumes, into tables apart")
    parser.add_argument("--edges", type=int, nargs="+", help="of the images, in pixels; multiples of 16")
    parser.add_argument("--attentions", type=int, nargs="+", help="in all of a network; multiples of 4 from 8 on")
    options = parser.parse_args(arguments)
    options.edges = options.edges or EDGES[options.spatial_dims]
    options.attentions = options.attentions or ATTENTIONS[options.spatial_dims]
    return options


def sweep(
    measure: Callable[[Network, tuple[object, ...]], dict[str, float]],
    *,
    edges: Sequence[int],
    attentions: Sequence[int],
    spatial_dims: int = 2,
) -> list[dict[str, object]]:
    """A row for each network, number of self-attentions and measured quantity; a column for each edge."""
    rows, networks = [], NETWORKS if spatial_dims == 2 else VOLUMETRIC
    for count, (name, build) in tqdm(list(product(attentions, networks.items())), unit="network"):
        with FakeTensorMode():
            network = build(count)
            values = [measure(network, network.inputs(edge)) for edge in edges]
        for quantity in values[0]:
            row: dict[str, object] = {"network": name, "attentions": count, "of": quantity}
            row |= {str(edge): value[quantity] for edge, value in zip(edges, values, strict=True)}
            rows.append(row | {"configuration": network.configuration})
    return rows

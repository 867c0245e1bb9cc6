"""Counts one quantity of every network in networks.py by the image's edge, on fake tensors: nothing is computed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from benchmarks.common.harness import Row, parser, report
from benchmarks.common.networks import NETWORKS, VOLUMETRIC, Network, reason_of
from benchmarks.cost.drawing import draw

EDGES: dict[int, Sequence[int]] = {2: (128, 256, 352, 512, 768, 1024), 3: (64, 96, 128)}
ATTENTIONS: dict[int, Sequence[int]] = {2: (20, 100), 3: (20,)}
Measure = Callable[[Network, tuple[object, ...]], dict[str, float]]


def run(
    measure: Measure,
    *,
    name: str,
    notes: Mapping[int, str],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Reports the table of flops.py or memory.py and, for images, draws it.

    Args:
        measure: returns quantities of a network on given inputs.
        name: of the table.
        notes: on the table, by the number of spatial dimensions.
        description: for ``--help``.
        arguments: of the command line.
    """
    options = parse(description, arguments)
    dims = options.spatial_dims
    rows = sweep(measure, edges=options.edges, attentions=options.attentions, spatial_dims=dims)
    report(name if dims == 2 else f"{name}-3d", rows, notes=notes[dims], packages=("monai",), measured=False)
    if dims == 2:
        draw()


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    own = parser(description)
    own.add_argument(
        "--spatial-dims", type=int, choices=(2, 3), default=2, help="2: images; 3: volumes, in tables of their own"
    )
    edges, attentions = (f"; by default {' '.join(map(str, default[2]))}" for default in (EDGES, ATTENTIONS))
    own.add_argument(
        "--edges", type=multiple_of(16), nargs="+", metavar="EDGE", help=f"edges of the images, in pixels{edges}"
    )
    own.add_argument(
        "--attentions",
        type=multiple_of(4),
        nargs="+",
        metavar="COUNT",
        help=f"numbers of self-attentions in a network{attentions}",
    )
    options = own.parse_args(arguments)
    options.edges = options.edges or EDGES[options.spatial_dims]
    options.attentions = options.attentions or ATTENTIONS[options.spatial_dims]
    return options


def multiple_of(step: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        number = int(text)
        if number < step or number % step:
            raise argparse.ArgumentTypeError(f"must be a multiple of {step}, got {text}")
        return number

    check.__name__ = "int"  # argparse shows this name if the text is no number
    return check


def sweep(measure: Measure, *, edges: Sequence[int], attentions: Sequence[int], spatial_dims: int = 2) -> Iterator[Row]:
    """Yields a row for each network, number of self-attentions and quantity, with a column for each edge.

    A network that cannot be measured, for example because its library is missing, has one row that says why.
    """
    networks = NETWORKS if spatial_dims == 2 else VOLUMETRIC
    for count, (name, build) in tqdm(list(product(attentions, networks.items())), unit="network"):
        row: Row = {"network": name, "attentions": count}
        try:
            with FakeTensorMode():
                network = build(count)
                values = [measure(network, network.inputs(edge)) for edge in edges]
        except Exception as error:  # whatever its kind, the other networks are still measured
            reason = reason_of(error)
            print(f"{name}: {reason}", file=sys.stderr)
            yield row | {"of": "-"} | {str(edge): "-" for edge in edges} | {"configuration": reason}
            continue
        for quantity in values[0]:
            columns = {str(edge): value[quantity] for edge, value in zip(edges, values, strict=True)}
            yield row | {"of": quantity} | columns | {"configuration": network.configuration}

"""One quantity of every network in networks.py against the image's edge, on fake tensors: nothing is computed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from benchmarks.common.harness import Row, parser
from benchmarks.common.networks import NETWORKS, VOLUMETRIC, Network, reason_of

EDGES = {2: (128, 256, 352, 512, 768, 1024), 3: (64, 96, 128)}
ATTENTIONS = {2: (20, 100), 3: (20,)}
Measure = Callable[[Network, tuple[object, ...]], dict[str, float]]


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    own = parser(description)
    own.add_argument("--spatial-dims", type=int, choices=(2, 3), default=2, help="3: of volumes, into tables apart")
    edges, attentions = (f"; by default {' '.join(map(str, default[2]))}" for default in (EDGES, ATTENTIONS))
    own.add_argument("--edges", type=multiple_of(16), nargs="+", metavar="EDGE", help=f"of the images, pixels{edges}")
    own.add_argument(
        "--attentions", type=multiple_of(4), nargs="+", metavar="COUNT", help=f"in all of a network{attentions}"
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

    check.__name__ = "int"  # as argparse names it where the text is no number
    return check


def sweep(measure: Measure, *, edges: Sequence[int], attentions: Sequence[int], spatial_dims: int = 2) -> Iterator[Row]:
    """A row for each network, number of self-attentions and measured quantity; a column for each edge.

    A network that cannot be measured, because its library is missing or broken for example, has one row that says why.
    """
    networks = NETWORKS if spatial_dims == 2 else VOLUMETRIC
    for count, (name, build) in tqdm(list(product(attentions, networks.items())), unit="network"):
        row: Row = {"network": name, "attentions": count}
        try:
            with FakeTensorMode():
                network = build(count)
                values = [measure(network, network.inputs(edge)) for edge in edges]
        except Exception as error:  # of whatever kind: the other networks are measured all the same
            reason = reason_of(error)
            print(f"{name}: {reason}", file=sys.stderr)
            yield row | {"of": "-"} | {str(edge): "-" for edge in edges} | {"configuration": reason}
            continue
        for quantity in values[0]:
            columns = {str(edge): value[quantity] for edge, value in zip(edges, values, strict=True)}
            yield row | {"of": quantity} | columns | {"configuration": network.configuration}

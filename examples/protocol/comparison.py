"""Compares the methods of a cross-validation: mean and deviation over folds, and paired differences over subjects.

python -m examples.protocol.comparison RESULTS --reference METHOD [--labelled 2] [--folds 0 1] [--seeds 0] [--levels 5]
"""

from collections.abc import Sequence

from examples.protocol.files import read_json
from examples.protocol.options import ComparisonOptions, console, parse


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(ComparisonOptions, arguments, __doc__)
    from examples.protocol.results.comparison import print_comparison  # after parsing, as scipy is slow to load

    print_comparison(read_json(options.results), options)


if __name__ == "__main__":
    console.run(main)

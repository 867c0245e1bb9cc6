"""What the commands show for --help, and how they end after a mistake of the user."""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = Path(__file__).resolve().parents[3]  # the examples and, in a clone, the package


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows every default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if (
            action.default is None
            or action.default is False
            or action.default == []
            or "default" in (action.help or "")
        ):
            return action.help
        return super()._get_help_string(action)


def run(main: Callable[[], Any]) -> None:
    """Runs a command. An error that the examples or the package raise on purpose becomes "error: ..." and status 2.

    Any other error is a fault in the code and keeps its traceback.
    """
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        if not isinstance(error, OSError) and not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a file of the examples or of the package, and not by a library that they call."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return "site-packages" not in raised_in.parts and raised_in.is_relative_to(OURS)

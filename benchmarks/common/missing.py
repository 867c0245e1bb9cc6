"""How a command ends if a library is missing: with one line that says how to install it, and status 2."""

import sys
from pathlib import Path
from types import TracebackType

FOLDER = Path(__file__).resolve().parents[1]  # benchmarks
# Names on the package index that differ from those that are imported.
PACKAGES = {"cv2": "opencv-python-headless", "skimage": "scikit-image"}


def explain() -> None:
    """Installs a hook for exceptions: imports fail at the top of a file, before the command's own code runs."""
    sys.excepthook = _end


def message(error: BaseException) -> str | None:
    """Returns what to tell the user, or None if the error is not that of a missing library."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    library = error.name.partition(".")[0]
    if (FOLDER.parent / library).is_dir():
        return None  # a file of ours that does not exist is a fault in the code
    return f'this benchmark needs {library}: pip install {PACKAGES.get(library, library)}, or pip install -e ".[dev]"'


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends a benchmark in this way. Any other program and any other error keep their traceback."""
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    text = message(error) if main_file and Path(main_file).resolve().is_relative_to(FOLDER) else None
    if text is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)  # the interpreter ends with this status if a hook asks for it

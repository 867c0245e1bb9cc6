"""Mutation testing: makes small faults in a module, one at a time, and counts those that its tests notice.

Torch is imported once; each mutant is compiled in a forked process and never written to disk. See tests/MUTANTS.md.
"""

import argparse
import ast
import copy
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The files of each module, and the tests that exercise them, the most telling first: a survivor costs them all.
MODULES = {
    "keypoints": ("keypoints.py", "test_keypoints.py test_checks.py"),
    "sampling": ("sampling.py", "test_sampling.py test_checks.py"),
    "scattering": ("scattering.py", "test_scattering.py test_checks.py"),
    "diffusion": (
        "diffusion/network.py diffusion/sparse.py normalization.py",
        "diffusion test_attention.py test_ecosystem.py test_checks.py",
    ),
    "attention": ("attention.py positions.py", "test_attention.py test_positions.py test_checks.py"),
    "losses": (
        "losses/pcl.py losses/keypoint_match.py losses/pretraining.py",
        "losses test_checks.py",
    ),
    "matching": ("matching/correspondence.py matching/matcher.py matching/sinkhorn.py", "matching test_checks.py"),
}
LEFT_OUT = "not compile and not export and not processes and not cuda and not memory"  # slow, or in other processes
UNTOUCHED = {"_gather", "_all_gather", "extra_repr"}  # functions that only run in other processes, or print
TIMEOUT = 300  # seconds, after which a mutant counts as noticed
EQUIVALENT = {"strict", "device"}  # keyword arguments that change nothing: lengths are checked, and there is one device
LIBRARIES = {"torch", "F", "nn", "dist", "math"}
OTHER: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd], ast.And: [ast.Or], ast.Or: [ast.And],
}  # fmt: skip


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Compare):
        yield from (ast.Compare(node.left, [o(), *node.ops[1:]], node.comparators) for o in OTHER[type(node.ops[0])])
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OTHER:
        mutant = copy.copy(node)
        mutant.op = OTHER[type(node.op)][0]()
        yield mutant
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Call):
        for i in (i for i, keyword in enumerate(node.keywords) if keyword.arg not in EQUIVALENT):
            yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func).split(".")[0] not in LIBRARIES:
            yield node.func.value  # x in place of x.method(...)


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where a node may be replaced: in which node, in which field, at which index. Messages and types are left out."""
    if isinstance(tree, ast.Raise | ast.JoinedStr) or getattr(tree, "name", None) in UNTOUCHED:
        return
    for field, value in ast.iter_fields(tree):
        if field not in ("annotation", "returns", "decorator_list"):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    yield tree, field, index
                    yield from places(child)


def mutants(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Each mutant of a module, and a line that tells it."""
    for parent, field, index in places(tree):
        whole = getattr(parent, field)
        node = whole if index is None else whole[index]
        for other in replacements(node):
            setattr(parent, field, other if index is None else [*whole[:index], other, *whole[index + 1 :]])
            yield f"{node.lineno}: {ast.unparse(node)}  ->  {ast.unparse(other)}", copy.deepcopy(tree)
            setattr(parent, field, whole)


class Mutated(SourceFileLoader, MetaPathFinder):
    """Finds and loads one module from a syntax tree."""

    def __init__(self, fullname: str, path: str, tree: ast.Module) -> None:
        super().__init__(fullname, path)
        self.tree = ast.fix_missing_locations(tree)

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> ModuleSpec | None:
        matches = fullname == self.name
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if matches else None

    def get_code(self, _fullname: str) -> object:
        return compile(self.tree, self.path, "exec", dont_inherit=True)


def survives(path: Path, tree: ast.Module, tests: str) -> bool:
    """Whether the tests pass with this in the file's place."""
    if (child := os.fork()) == 0:
        signal.alarm(TIMEOUT)
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        sys.meta_path.insert(0, Mutated(name, str(path), tree))
        files = [str(path), *(str(ROOT / "tests" / file) for file in tests.split())]
        # Rewriting assertions, pytest would load the file itself, without the fault.
        os._exit(int(pytest.main(["-x", "--assert=plain", "-p", "no:cacheprovider", "-k", LEFT_OUT, *files])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES), metavar="module", help=", ".join(MODULES))
    parser.add_argument("--sample", type=int, default=30, help="mutants of each module, drawn at random; 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for module in arguments.modules:
        (files, tests), start, found, alive = MODULES[module], time.monotonic(), [], 0
        for path in (ROOT / "kaf_layer" / file for file in files.split()):
            tree = ast.parse(path.read_text())
            if not survives(path, tree, tests):
                sys.exit(f"{path.name}: its tests fail, or take too long, without any fault")
            found += [(path, f"{path.name}:{line}", mutant) for line, mutant in mutants(tree)]
        drawn = random.Random(arguments.seed).sample(found, min(arguments.sample or len(found), len(found)))
        for path, line, mutant in drawn:
            if survives(path, mutant, tests):
                print(f"    {line}", flush=True)
                alive += 1
        counts = f"{len(drawn) - alive} of {len(drawn)} noticed, {len(found)} possible"
        print(f"{module}: {counts}, in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    import kornia.augmentation  # noqa: F401
    import pytest
    import torch._dynamo  # noqa: F401

    main()

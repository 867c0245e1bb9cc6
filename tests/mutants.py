"""Mutation testing: makes small faults in a module, one at a time, and counts those that its tests notice.

    python tests/mutants.py sampling losses.pcl --sample 30

Torch is imported once; each mutant is compiled in a forked process and never written to disk. Why not mutmut or
cosmic-ray, and which mutants survive, is in tests/MUTANTS.md.
"""

import argparse
import ast
import copy
import importlib.util
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parent.parent

# What exercises each module, the most telling first: a survivor costs all of it. Each module's doctests come before.
TESTS = {
    "keypoints": "test_keypoints.py test_sampling.py test_augmentation.py",
    "checks": "test_checks.py test_keypoints.py test_layer.py",
    "sampling": "test_sampling.py test_layer.py",
    "scattering": "test_scattering.py diffusion/test_network.py",
    "attention": "test_attention.py test_layer.py matching/test_matcher.py",
    "losses.pcl": "losses/test_pcl.py losses/test_pretraining.py",
    "losses.keypoint_match": "losses/test_keypoint_match.py losses/test_pretraining.py",
    "losses.pretraining": "losses/test_pretraining.py",
    "losses.checks": "losses/test_pcl.py losses/test_keypoint_match.py",
    "matching.correspondence": "matching/test_correspondence.py",
    "matching.matcher": "matching/test_matcher.py losses/test_keypoint_match.py",
    "matching.sinkhorn": "matching/test_sinkhorn.py matching/test_matcher.py",
}
OTHER: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd], ast.And: [ast.Or], ast.Or: [ast.And],
}  # fmt: skip
LIBRARIES = {"torch", "F", "nn", "dist", "math"}


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    operator = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, "op", None)
    for other in OTHER.get(type(operator), []):
        mutant = copy.copy(node)
        if isinstance(node, ast.Compare):
            mutant.ops = [other(), *node.ops[1:]]
        else:
            mutant.op = other()
        yield mutant
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Call):
        for i in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func).split(".")[0] not in LIBRARIES:
            yield node.func.value  # x in place of x.method(...)


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where a node may be replaced: in which node, in which field, at which index. Messages and types are left out."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list") or isinstance(value, ast.Raise | ast.JoinedStr):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                yield tree, field, index
                yield from places(child)


def mutants(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Each mutant of a module, and a line that tells it."""
    for parent, field, index in places(tree):
        whole = getattr(parent, field)
        node = whole if index is None else whole[index]
        for other in replacements(node):
            setattr(parent, field, other if index is None else [*whole[:index], other, *whole[index + 1 :]])
            before, after = (ast.unparse(ast.fix_missing_locations(copy.copy(n))) for n in (node, other))
            yield f"line {getattr(node, 'lineno', '?')}: {before}  ->  {after}", copy.deepcopy(tree)
            setattr(parent, field, whole)


class Mutated(SourceFileLoader, MetaPathFinder):
    """Finds and loads one module from a syntax tree."""

    def __init__(self, fullname: str, path: str, tree: ast.Module) -> None:
        super().__init__(fullname, path)
        self.tree = ast.fix_missing_locations(tree)

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> ModuleSpec | None:
        matches = fullname == self.name
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if matches else None

    def get_code(self, _fullname: str) -> CodeType:
        return compile(self.tree, self.path, "exec", dont_inherit=True)


def survives(module: str, path: Path, tree: ast.Module, timeout: float) -> bool:
    """Whether the module's tests pass with this in its place."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.meta_path.insert(0, Mutated(f"kaf_layer.{module}", str(path), tree))
        tests = [str(path), *(str(ROOT / "tests" / name) for name in TESTS[module].split())]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    descriptor = os.pidfd_open(child)
    finished, _, _ = select.select([descriptor], [], [], timeout)
    os.close(descriptor)
    if not finished:
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="module", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, default=30, help="mutants of each module, drawn at random; 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a mutant counts as noticed")
    arguments = parser.parse_args()
    for module in arguments.modules:
        path, start = ROOT / "kaf_layer" / f"{module.replace('.', '/')}.py", time.monotonic()
        tree = ast.parse(path.read_text())
        if not survives(module, path, tree, arguments.timeout):
            sys.exit(f"{module}: its tests fail without any fault")
        found = list(mutants(tree))
        chosen = random.Random(arguments.seed).sample(found, min(arguments.sample or len(found), len(found)))
        survivors = [line for line, mutant in chosen if survives(module, path, mutant, arguments.timeout)]
        killed, seconds = len(chosen) - len(survivors), time.monotonic() - start
        print(f"{module}: {killed} of {len(chosen)} noticed ({len(found)} possible), {seconds:.0f} s", flush=True)
        print("".join(f"    {line}\n" for line in survivors), end="", flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    import kornia.augmentation  # noqa: F401
    import pytest

    main()

"""Checks the shapes in the package's annotations, such as ``Annotated[Tensor, "B N E"]``, while it runs."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Annotated, Any

import beartype
import jaxtyping
import pytest
from torch import Tensor

import kaf_layer


def check_shapes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes each function and method of the package check its annotated tensors; returns their names.

    Within a call the same letter stands for the same size, in the arguments and in the result.
    """
    names = [info.name for info in pkgutil.walk_packages(kaf_layer.__path__, "kaf_layer.")]
    # Annotations of plotting name matplotlib's types, which it does not import.
    modules = [importlib.import_module(name) for name in names if not name.startswith("kaf_layer.plotting")]
    checked = {}
    for function, owner in functions(modules):
        wrapped = with_shapes(function)
        if wrapped is not None:
            checked[function] = wrapped
            if inspect.isclass(owner):
                monkeypatch.setattr(owner, function.__name__, wrapped)
    for module in [kaf_layer, *modules]:
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and value in checked:
                monkeypatch.setattr(module, name, checked[value])
    return [f"{function.__module__}.{function.__qualname__}" for function in checked]


def functions(modules: list[ModuleType]) -> Iterator[tuple[FunctionType, object]]:
    """The functions and methods that modules define, each with its module or class."""
    for module in modules:
        for owner in (module, *(value for value in vars(module).values() if inspect.isclass(value))):
            for value in vars(owner).values():
                if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                    yield value, owner


def with_shapes(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function with its shapes checked; None if it has none, or another function is wrapped in it."""
    if hasattr(function, "__wrapped__"):
        return None
    hints = typing.get_type_hints(function, include_extras=True)
    sizes: set[str] = set()
    converted = {name: convert(hint, sizes) for name, hint in hints.items() if "Annotated[" in repr(hint)}
    if not converted:
        return None

    # Another function, since annotations belong to a function and the package's stay as they are.
    @functools.wraps(function)
    def typed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    del typed.__wrapped__
    parameters = inspect.signature(function).parameters.values()
    typed.__signature__ = inspect.Signature(
        [p.replace(annotation=converted.get(p.name, p.empty)) for p in parameters],
        return_annotation=converted.get("return", inspect.Signature.empty),
    )
    typed.__annotations__ = converted
    return jaxtyping.jaxtyped(typed, typechecker=beartype.beartype)


def convert(hint: Any, sizes: set[str]) -> Any:
    """The hint with jaxtyping's types in the place of annotated tensors.

    Args:
        hint: of an argument or a result.
        sizes: the letters that arguments before it have given a size; its own are added.
    """
    if typing.get_origin(hint) is Annotated:
        _, shape = typing.get_args(hint)
        return jaxtyping.Shaped[Tensor, shape_of(shape, sizes)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # Of what may be left out no letter is known.
        return typing.Union[tuple(convert(part, set(sizes)) for part in typing.get_args(hint))]  # noqa: UP007
    if "Annotated[" not in repr(hint) or typing.get_origin(hint) is collections.abc.Callable:
        return hint
    return typing.get_origin(hint)[tuple(convert(part, sizes) for part in typing.get_args(hint))]


def shape_of(text: str, sizes: set[str]) -> str:
    """A shape in jaxtyping's syntax; sizes that it cannot know, such as N + 1 before N, may be anything."""
    entries = []
    for entry in text.split():
        if entry.endswith("_i"):  # each element of a sequence has its own
            entry = "_"
        elif entry.lstrip("*").isidentifier():
            sizes.add(entry)
        elif entry != "..." and entry.startswith("*"):
            entry = "..."
        elif entry != "..." and not entry.isdigit():
            entry = re.sub(r"(\d)([A-Za-z])", r"\1*\2", entry).replace("^", "**").replace("/", "//")
            if not set(re.findall(r"[A-Za-z_]\w*", entry)) <= sizes:
                entry = "_"
        entries.append(entry)
    several = sum(entry == "..." or entry.startswith("*") for entry in entries) > 1
    return "..." if several else " ".join(entries)

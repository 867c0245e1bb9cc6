"""What mkdocstrings reads: in docstrings ``.. math::`` becomes MathML and "Example:" code; types are told."""

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from griffe import Expr, ExprName, Extension, Module, Object
from latex2mathml.converter import convert

MATH = re.compile(r":math:`([^`]+)`")
FORMULA = re.compile(r"^\.\. math:: (.*(?:\n[ ]+\S.*)*)", flags=re.MULTILINE)


class Docstrings(Extension):
    """Rewrites the docstring of every object, once it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each object; aliases share the docstring of what they stand for."""
        if obj.docstring is None:
            return

        def formula(match: re.Match[str]) -> str:
            return f'<div class="formula">{convert(" ".join(match[1].split()), display="block")}</div>'

        text = FORMULA.sub(formula, obj.docstring.value)
        text = MATH.sub(lambda match: convert(match[1]), text)
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Called once all is loaded: signatures show what a name such as ``FusionMode`` stands for."""
        for module in walk(pkg):
            for obj in module.members.values():
                if obj.is_alias:
                    continue
                functions = obj.functions.values() if obj.is_class else [obj] if obj.is_function else []
                for function in functions:
                    for parameter in function.parameters:
                        parameter.annotation = written_out(parameter.annotation, pkg)
                    function.returns = written_out(function.returns, pkg)


def walk(module: Module) -> Iterator[Module]:
    """The package and all modules in it."""
    yield module
    for inner in module.modules.values():
        if not inner.is_alias:
            yield from walk(inner)


def written_out(annotation: Any, package: Module) -> Any:
    """An annotation in which names of types of this package are replaced by what they are assigned."""
    if isinstance(annotation, ExprName):
        module, _, name = annotation.canonical_path.rpartition(".")
        found = dict(package.modules_collection[module].members).get(name) if module.startswith(package.path) else None
        known = found is not None and not found.is_alias and found.is_attribute and isinstance(found.value, Expr)
        return found.value if known else annotation
    if isinstance(annotation, list):
        return [written_out(part, package) for part in annotation]
    if isinstance(annotation, Expr):
        values = {field.name: getattr(annotation, field.name) for field in fields(annotation)}
        return replace(annotation, **{name: written_out(value, package) for name, value in values.items()})
    return annotation

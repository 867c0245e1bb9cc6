"""Docstrings in the form that mkdocstrings reads: roles become links, ``.. math::`` MathML, "Example:" code."""

import re
from typing import Any

from griffe import AliasResolutionError, Extension, NameResolutionError, Object
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:class|func|meth):`(~?)([\w.]+)`")
MATH = re.compile(r":math:`([^`]+)`")
FORMULA = re.compile(r"^\.\. math:: (.*(?:\n[ ]+\S.*)*)", flags=re.MULTILINE)


class Docstrings(Extension):
    """Rewrites the docstring of every object, once it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each object; aliases share the docstring of what they stand for."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            name = match[2]
            shown = name.rpartition(".")[2] if match[1] else name
            if not name.startswith("kaf_layer"):
                try:
                    name = obj.resolve(name)
                except (NameResolutionError, AliasResolutionError):
                    return f"`{shown}`"  # of another library
            return f"[`{shown}`][{name}]"

        def formula(match: re.Match[str]) -> str:
            return f'<div class="formula">{convert(" ".join(match[1].split()), display="block")}</div>'

        text = ROLE.sub(link, obj.docstring.value)
        text = FORMULA.sub(formula, text)
        text = MATH.sub(lambda match: convert(match[1]), text)
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)

"""What the command lines say: names, defaults, help and checks, without anything that is slow to load."""

from examples.protocol.options.commands import (
    ComparisonOptions,
    CurveOptions,
    DataOptions,
    DemoOptions,
    FigureOptions,
    FinetuneOptions,
    PredictOptions,
    PretrainOptions,
)
from examples.protocol.options.fields import changed, parse, read_settings
from examples.protocol.options.reading import ReadingOptions
from examples.protocol.options.recipes import PRESETS, Recipe
from examples.protocol.options.shared import Options

__all__ = [
    "PRESETS",
    "ComparisonOptions",
    "CurveOptions",
    "DataOptions",
    "DemoOptions",
    "FigureOptions",
    "FinetuneOptions",
    "Options",
    "PredictOptions",
    "PretrainOptions",
    "ReadingOptions",
    "Recipe",
    "changed",
    "parse",
    "read_settings",
]

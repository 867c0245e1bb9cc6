"""Options as frozen dataclasses: each field holds its default and its help, and the parser is made from the fields."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from inspect import get_annotations
from typing import Any, ClassVar, TypeVar

from examples.protocol.options.console import HelpFormatter

OptionsType = TypeVar("OptionsType", bound="CommandLine")


def option(text: str, *, default: Any = MISSING, positional: bool = False, place: bool = False, **flags: Any) -> Any:
    """A field that is an option of the command line.

    Args:
        text: the help.
        default: the value where the option is not given. Without a default the option is required, unless the preset
            has a value.
        positional: the option is given without its name.
        place: the option says where something is, or how often or fast. It does not decide what a run computes, so a
            resumed run may change it.
        flags: arguments of ``argparse``'s ``add_argument``.
    """
    return field(default=default, metadata={"help": text, "positional": positional, "place": place, "flags": flags})


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The base of all dataclasses of options. A field that is not made by ``option`` is not on the command line."""

    title: ClassVar[str] = "options"  # of the class's own options in --help

    @classmethod
    def defaults(cls, arguments: Sequence[str] | None) -> dict[str, Any]:  # noqa: ARG003
        """The values that depend on other arguments and replace the fields' defaults."""
        return {}

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """All values, with those filled in that follow from others."""
        return dict(values)

    def check(self) -> None:
        """Refuses options that do not fit together.

        Raises:
            ValueError: with the names of the options.
        """

    def settings(self) -> dict[str, Any]:
        """The options that decide what a run computes, as JSON would give them back."""
        chosen = {f.name: getattr(self, f.name) for f in shown(type(self)) if not f.metadata["place"]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(chosen.items())}


def shown(cls: type[CommandLine]) -> list[Field[Any]]:
    """The fields on the command line."""
    return [f for f in fields(cls) if "help" in f.metadata]


def groups(cls: type[CommandLine]) -> dict[str, list[Field[Any]]]:
    """The fields on the command line by the title of the class that declares them, a subclass before its base."""
    left = {f.name: f for f in shown(cls)}
    found = {base: [left.pop(name) for name in get_annotations(base) if name in left] for base in cls.__mro__}
    return {base.title: own for base, own in found.items() if own and issubclass(base, CommandLine)}


def parser_of(
    cls: type[CommandLine], description: str | None = None, defaults: Mapping[str, Any] | None = None, **more: Any
) -> argparse.ArgumentParser:
    """A parser with the options of a dataclass.

    Args:
        cls: the dataclass.
        description: what ``--help`` shows first.
        defaults: values that replace the defaults of the fields.
        more: arguments of ``argparse.ArgumentParser``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, **more)
    for title, own in groups(cls).items():
        group = parser.add_argument_group(title)
        for f in own:
            default = (defaults or {}).get(f.name, f.default)
            flags = {"help": f.metadata["help"], **f.metadata["flags"]}
            if default is MISSING:
                flags |= {} if f.metadata["positional"] else {"required": True}
            else:
                flags["default"] = list(default) if isinstance(default, tuple) else default
            group.add_argument(f.name if f.metadata["positional"] else f"--{f.name.replace('_', '-')}", **flags)
    return parser


def parse(
    cls: type[OptionsType], arguments: Sequence[str] | None = None, description: str | None = None
) -> OptionsType:
    """The options that a command line gives, by default that of this process.

    Raises:
        ValueError: if they do not fit together.
        SystemExit: if they cannot be parsed, or ask for help.
    """
    defaults = cls.defaults(arguments)
    return build(cls, defaults | vars(parser_of(cls, description, defaults).parse_args(arguments)))


def build(cls: type[OptionsType], values: Mapping[str, Any]) -> OptionsType:
    """Options with these values, completed and checked; lists become tuples."""
    options = cls(**cls.completed(_plain(values)))
    options.check()
    return options


def read_settings(cls: type[OptionsType], settings: Mapping[str, Any], **others: Any) -> OptionsType:
    """The options of an earlier run.

    Args:
        cls: the dataclass.
        settings: what ``CommandLine.settings`` gave, perhaps with other keys. An option that an older run did not
            know has its default.
        others: values of options that are not among the settings.
    """
    names = {f.name for f in fields(cls)}
    before = cls.defaults(["--preset", settings["preset"]]) if "preset" in settings else {}
    known = {name: value for name, value in settings.items() if name in names}
    return cls(**cls.completed(before | _plain(known) | others))


def changed(options: OptionsType, values: Mapping[str, Any]) -> OptionsType:
    """The same options, but for some values."""
    return replace(options, **_plain(values))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

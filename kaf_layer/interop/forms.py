"""Outputs of submodules: which tensor is the map, which axis its channels are, and how tokens lie in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path

__all__ = ["Form", "TokenGrid", "find_map"]


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens (B, prefix + n, C) of a vision Transformer lie in the image.

    The n tokens are the cells of a grid over the image, in row-major order. The tokens in front of them, such as a
    class token or registers, have no position in the image, and a KAF layer does not change them.

    Args:
        patch: the size in pixels of a token's patch, one number or one for each axis in tensor order. The grid's size
            is then the image's, divided by it and rounded down, or rounded up if that gives the number of tokens.
        size: the grid's size in tensor order, instead of ``patch``.
        prefix: the number of tokens in front of the grid.

    Raises:
        ValueError: if there is not exactly one of ``patch`` and ``size``, or a number is out of range.

    Example:
        >>> TokenGrid(patch=16, prefix=1).of(tokens=197, image_size=(224, 224))
        (14, 14)
    """

    patch: int | Sequence[int] | None = None
    size: Sequence[int] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        if (self.patch is None) == (self.size is None):
            raise ValueError(f"give either patch or size, got patch={self.patch!r} and size={self.size!r}")
        numbers = self.size if self.patch is None else self.patch
        for number in numbers if isinstance(numbers, Sequence) else [numbers]:
            if not isinstance(number, Integral) or int(number) < 1:
                raise ValueError(f"patch and size must be whole numbers from 1, got {numbers!r}")
        if not isinstance(self.prefix, Integral) or self.prefix < 0:
            raise ValueError(f"prefix must be a whole number, 0 or more, got prefix={self.prefix!r}")

    def of(self, tokens: int, image_size: Sequence[int]) -> tuple[int, ...]:
        """The grid's size.

        Args:
            tokens: how many there are, those in front included.
            image_size: the image's size in tensor order.

        Raises:
            ValueError: if the grid has another number of axes than the image, or of tokens.
        """
        sizes = [tuple(self.size or ())]
        if self.patch is not None:
            patch = self.patch if isinstance(self.patch, Sequence) else (self.patch,) * len(image_size)
            if len(patch) != len(image_size):
                raise ValueError(f"patch must have one number for each axis of the image, got {patch} for {image_size}")
            pairs = list(zip(image_size, patch, strict=True))
            sizes = [tuple(s // p for s, p in pairs), tuple(-(-s // p) for s, p in pairs)]
        for size in sizes:
            if len(size) == len(image_size) and prod(size) == tokens - self.prefix:
                return size
        raise ValueError(
            f"the tokens must be the grid's, behind prefix={self.prefix} others: got {tokens} tokens for a grid of "
            f"{sizes[0]} in an image of {tuple(image_size)}"
        )


@dataclass(frozen=True)
class Form:
    """What a submodule returns.

    Args:
        channels_last: whether its map is (B, *S, C).
        tokens: how its tokens (B, N, C) lie in the image; None if it returns a map.
        output: the index or key of the map, where it returns several.
    """

    channels_last: bool = False
    tokens: TokenGrid | None = None
    output: int | str | None = None

    def to_map(self, value: Tensor, image_size: Sequence[int]) -> Tensor:
        """The map (B, C, *S) that the value holds."""
        if self.tokens is not None:
            grid = self.tokens.of(value.shape[1], image_size)
            return torch.unflatten(value[:, self.tokens.prefix :].mT, 2, grid)
        return value.movedim(-1, 1) if self.channels_last else value

    def from_map(self, features: Tensor, value: Tensor) -> Tensor:
        """The value with another map in it."""
        if self.tokens is not None:
            return torch.cat([value[:, : self.tokens.prefix], features.flatten(2).mT], dim=1)
        return features.movedim(1, -1) if self.channels_last else features

    def describe(self) -> str:
        """Its axes, for messages."""
        if self.tokens is not None:
            return "as tokens (B, N, C)"
        return "(B, *S, C)" if self.channels_last else "(B, C, *S), or be named in channels_last or tokens"


def find_map(name: str, returned: Any, form: Form) -> tuple[list[Any], TreeSpec, int]:
    """Takes what a submodule returns apart: its leaves, how they belong together, and which of them is the map.

    Raises:
        ValueError: if there is no map, or more than one of which none is chosen.
    """
    leaves, spec = tree_flatten(returned)
    tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if form.output is not None:
        try:
            chosen = returned[form.output]
        except (KeyError, IndexError, TypeError) as error:
            keys = [keystr(path) for path, _ in _paths(returned)]
            raise ValueError(f"outputs must name what {name!r} returns, got {form.output!r} for {keys}") from error
        tensors = [index for index in tensors if leaves[index] is chosen]
    maps = [i for i in tensors if (leaves[i].ndim == 3 if form.tokens is not None else leaves[i].ndim >= 4)]
    if len(maps) == 1:
        return leaves, spec, maps[0]
    if maps:
        found = {keystr(path): tuple(leaves[i].shape) for i, (path, _) in enumerate(_paths(returned)) if i in maps}
        raise ValueError(
            f"{name!r} returns several maps, {found}: name a submodule that returns one, or say which it is by its "
            f"index or key in outputs={{{name!r}: ...}}"
        )
    axes = "tokens (B, N, C)" if form.tokens is not None else "a map (B, C, *S)"
    leaf = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if leaf is None:
        raise ValueError(f"{name!r} must return {axes}, got no tensor but {[type(leaf) for leaf in leaves]}")
    hint = ""
    if form.tokens is None and leaf.ndim == 3:
        hint = f"; if these are tokens (B, N, C), say how they lie in the image: tokens={{{name!r}: TokenGrid(...)}}"
    raise ValueError(f"{name!r} must return {axes}, got shape {tuple(leaf.shape)} of {leaf.dtype}{hint}")


def _paths(returned: Any) -> list[Any]:
    return tree_flatten_with_path(returned)[0]

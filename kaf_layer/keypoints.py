"""Keypoints, which all parts of the package exchange."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from numbers import Integral
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kaf_layer.precision import at_least_float32

__all__ = ["KeypointSample", "Keypoints", "check_size"]


@dataclass(eq=False)
class Keypoints:
    """A batch of keypoints, padded to a common number of slots.

    Slots that are not ``valid`` may hold anything, NaN included. They influence nothing.
    The class is a pytree, so it passes through ``torch.compile``, ``torch.export`` and
    DDP. A batch is iterable: ``keypoints[i]`` is one sample, without the batch axis, and ``stack`` joins samples.

    Sampling, attention and diffusion clamp positions outside the image, infinite ones too, to its border.
    In a valid slot a coordinate that is NaN counts as 0. Neither raises an error, because looking at values would make
    a GPU wait. ``check`` looks at them, and ``print(keypoints)`` shows how many keypoints lie outside.

    Args:
        positions: (B, N, D) float, in pixels of the image, in ``(x, y)`` or ``(x, y, z)``
            order, with pixel centres at integers.
        valid: (B, N) bool, which slots hold keypoints.
        image_size: the image's size in tensor order, ``(H, W)`` or ``(D, H, W)``.
        scores: (B, N), the detector's response.
        scales: (B, N), in pixels.
        angles: (B, N), in radians, from the x axis towards the y axis.
        descriptors: (B, N, K).
        padded: False promises that every slot is valid, so that attention needs no mask. To
            remove keypoints from such a batch, use ``keep``.

    Raises:
        ValueError: if a shape, a size, or the type of ``positions`` or ``valid`` does not fit.

    Example:
        >>> positions = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
        >>> kp = Keypoints(positions, torch.tensor([[True, False]]), (4, 8))
        >>> kp.cells((2, 4)).tolist()  # row 0, column 1 of a 2x4 map; the padded slot is in cell 0
        [[1, 0]]
        >>> kp.positions_in((2, 4))[0, 0].tolist()
        [1.25, 0.25]
        >>> len(kp), len(kp[0])
        (1, 2)
        >>> kp
        Keypoints(1 sample x 2 slots, 1 valid, image 4x8)
    """

    positions: Annotated[Tensor, "B N D"]
    valid: Annotated[Tensor, "B N"]
    image_size: tuple[int, ...]
    _: KW_ONLY
    scores: Annotated[Tensor, "B N"] | None = None
    scales: Annotated[Tensor, "B N"] | None = None
    angles: Annotated[Tensor, "B N"] | None = None
    descriptors: Annotated[Tensor, "B N K"] | None = None
    padded: bool = True

    def __post_init__(self) -> None:
        # Pytree transformations put objects other than tensors into the fields.
        if isinstance(self.positions, Tensor) and isinstance(self.valid, Tensor):
            self._check(self.positions.shape[:-1])

    def _check(self, slots: torch.Size) -> None:
        if not _is_size(self.image_size):
            raise ValueError(f"image_size must hold whole numbers from 1, got {self.image_size!r}")
        positions, image_size = self.positions, self.image_size
        if len(slots) not in (1, 2) or positions.shape[-1] != len(image_size):
            raise ValueError(
                "positions must be (B, N, D), or (N, D) for one sample, with D coordinates for D axes of "
                f"image_size, got {positions.shape=} and {image_size=}"
            )
        if not positions.is_floating_point():
            raise ValueError(f"positions must be floating point (call .float()), got {positions.dtype}")
        if self.valid.dtype != torch.bool:
            raise ValueError(f"valid must be boolean (call .bool()), got {self.valid.dtype}")
        for name in ("valid", "scores", "scales", "angles", "descriptors"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.shape[: len(slots)] != slots:
                shape = tuple(value.shape)
                raise ValueError(f"{name} must begin with the shape {tuple(slots)} of the slots, got {shape}")

    def check(self) -> Keypoints:
        """Checks for what is allowed but rarely intended, and returns the keypoints.

        No module does this by itself, because it makes a GPU wait. Call it where keypoints are made, or once on the
        first batch.

        Raises:
            ValueError: if valid keypoints are NaN or lie outside the image, as when (y, x) was given for (x, y).

        Warns:
            UserWarning: if a sample has no keypoints. A KAF layer does nothing for it.

        Example:
            >>> Keypoints(torch.tensor([[1.0, 6.0]]), torch.tensor([True]), (4, 8)).check()
            Traceback (most recent call last):
                ...
            ValueError: positions must be (x, y) in pixels of the image, got 1 valid keypoint outside of 4x8 (height x
            width): are x and y swapped?
            >>> Keypoints(torch.tensor([[6.0, 1.0]]), torch.tensor([True]), (4, 8)).check()
            Keypoints(1 slot, 1 valid, image 4x8)
        """
        outside = int(self._outside().sum())
        if outside:
            axes, size = ("x, y", "height x width") if self.spatial_dims == 2 else ("x, y, z", "depth x height x width")
            swapped = replace(self, positions=self.positions.flip(-1))._outside()
            advice = "are they in another unit?" if swapped.any() else f"are {axes[0]} and {axes[-1]} swapped?"
            raise ValueError(
                f"positions must be ({axes}) in pixels of the image, got {_plural(outside, 'valid keypoint')} "
                f"outside of {_by(self.image_size)} ({size}): {advice}"
            )
        empty = (~self.valid.reshape(-1, self.valid.shape[-1]).any(dim=1)).nonzero().flatten().tolist()
        if empty:
            named = f"samples {empty} have no keypoints" if self.valid.ndim == 2 else "there are no keypoints"
            warnings.warn(f"{named}: KAF layers do nothing for them", stacklevel=2)
        return self

    def _outside(self) -> Annotated[Tensor, "B N"]:
        """Which valid keypoints do not lie in the image's pixels, or are NaN."""
        axes = zip(self.positions.detach().unbind(-1), reversed(self.image_size), strict=True)
        inside = [(p >= -0.5) & (p <= size - 0.5) for p, size in axes]
        return self.valid & ~torch.stack(inside, dim=-1).all(dim=-1)

    def __repr__(self) -> str:
        """One line: how many samples, slots and valid keypoints, the image's size, and which fields there are."""
        if not isinstance(self.positions, Tensor) or not isinstance(self.valid, Tensor):
            return f"Keypoints(positions={self.positions!r}, valid={self.valid!r}, image_size={self.image_size!r})"
        *batch, slots = self.valid.shape
        parts = [" x ".join([*(_plural(count, "sample") for count in batch), _plural(slots, "slot")])]
        parts += self._counts()
        parts.append(f"image {_by(self.image_size)}")
        parts += [name for name in ("scores", "scales", "angles", "descriptors") if getattr(self, name) is not None]
        return f"Keypoints({', '.join(parts)})"

    def _counts(self) -> list[str]:
        """How many keypoints are valid and how many of these outside; nothing where there are no values to look at."""
        if type(self.valid) is not Tensor or self.valid.device.type == "meta" or torch.compiler.is_compiling():
            return []
        try:
            counts, outside = self.valid.sum(dim=-1).flatten().tolist(), int(self._outside().sum())
        except RuntimeError:  # under torch.func.vmap, for example
            return []
        least, most = min(counts, default=0), max(counts, default=0)
        valid = f"{least} valid" if least == most else f"{least} to {most} valid"
        return [valid, *([f"{outside} outside of the image"] if outside else [])]

    @property
    def spatial_dims(self) -> int:
        """The number of spatial axes, 2 or 3."""
        return len(self.image_size)

    def __len__(self) -> int:
        """The number of samples; for one sample the number of slots."""
        return len(self.positions)

    def __iter__(self) -> Iterator[Keypoints]:
        """The samples of a batch."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Keypoints:
        """The samples at ``index``; an integer gives one sample, without the batch axis."""
        one = self.valid[index].ndim == 1
        return self._map(lambda value: value[index], KeypointSample if one else Keypoints)

    def to(self, *args: Any, **kwargs: Any) -> Keypoints:
        """Moves or converts the tensors like ``torch.Tensor.to``.

        A dtype changes floating-point tensors only. Positions stay in single precision at least, since half precision
        cannot distinguish neighbouring pixels of a large image.
        """

        def move(value: Tensor) -> Tensor:
            moved = value.to(*args, **kwargs)
            return moved if value.is_floating_point() else moved.to(value.dtype)

        moved = self._map(move)
        dtype = at_least_float32(moved.positions.dtype)
        if moved.positions.dtype == dtype:
            return moved
        return replace(moved, positions=self.positions.to(moved.positions.device, dtype))

    def keep(self, mask: Annotated[Tensor, "B N"]) -> Keypoints:
        """Keeps the keypoints that a mask marks, such as those inside the body; other slots become invalid.

        Args:
            mask: (B, N) bool.
        """
        return replace(self, valid=self.valid & mask, padded=True)

    def detach(self) -> Keypoints:
        """The same keypoints, detached from the autograd graph."""
        return self._map(Tensor.detach)

    def pin_memory(self) -> Keypoints:
        """The same keypoints in page-locked memory; a ``DataLoader`` calls this."""
        return self._map(Tensor.pin_memory)

    def positions_in(self, feature_size: Sequence[int]) -> Annotated[Tensor, "B N D"]:
        """Positions (B, N, D) in pixels of a map of another size. Slots that are not valid hold finite values.

        Args:
            feature_size: the map's size in tensor order. Positions outside the image stay outside the map.
        """
        check_size(feature_size, self)
        positions = self.positions.where(self.valid[..., None], 0.0).nan_to_num(0.0, math.inf, -math.inf)
        positions = positions.to(at_least_float32(positions.dtype))
        # Under a compiler sizes may be symbols, and a comparison would specialise the graph.
        if not torch.compiler.is_compiling() and tuple(feature_size) == tuple(self.image_size):
            return positions
        # Axis by axis with Python numbers, since a tensor of sizes would be a synchronising copy on CUDA.
        axes = zip(positions.unbind(-1), reversed(feature_size), reversed(self.image_size), strict=True)
        return torch.stack([(p + 0.5) * feature / image - 0.5 for p, feature, image in axes], dim=-1)

    def cells(self, feature_size: Sequence[int]) -> Annotated[Tensor, "B N"]:
        """The row-major index of the cell of a map that holds each keypoint; 0 for slots that are not valid.

        Args:
            feature_size: the map's size in tensor order. Positions outside the image are clamped into the map.
        """
        *others, index = (coordinate.long() for coordinate in self._cell_coordinates(feature_size))
        for coordinate, size in zip(reversed(others), feature_size[1:], strict=True):
            index = torch.add(coordinate, index, alpha=size)
        return index

    def resize(self, feature_size: Sequence[int], *, snap: bool = False) -> Keypoints:
        """The same keypoints in pixels of a map of another size, without scores, scales, angles and descriptors.

        Args:
            feature_size: the map's size in tensor order.
            snap: whether to move each keypoint to the centre of its cell.
        """
        if snap:
            positions = torch.stack(self._cell_coordinates(feature_size), dim=-1).floor()
        else:
            positions = self.positions_in(feature_size)
        return type(self)(positions, self.valid, tuple(feature_size), padded=self.padded)

    def _cell_coordinates(self, feature_size: Sequence[int]) -> list[Tensor]:
        """Positions in units of cells, clamped into the map; rounded down they are the cells."""
        ends = (self.positions_in(feature_size).detach() + 0.5).unbind(-1)
        return [p.clamp(0, size - 1) for p, size in zip(ends, reversed(feature_size), strict=True)]

    @staticmethod
    def stack(samples: Sequence[Keypoints]) -> Keypoints:
        """Joins samples of one image size into a batch, padding them to the largest count.

        Args:
            samples: keypoints without a batch axis, as ``keypoints[i]`` gives them. An optional
                field is kept if all samples have it.

        Raises:
            ValueError: if there are no samples, one has a batch axis, or their image sizes differ.

        Example:
            >>> a = Keypoints(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool), (8, 6))
            >>> b = Keypoints(torch.zeros(1, 2), torch.ones(1, dtype=torch.bool), (8, 6))
            >>> Keypoints.stack([a, b]).valid.tolist()
            [[True, True, True], [True, False, False]]
        """
        if not samples or any(sample.valid.ndim != 1 for sample in samples):
            shapes = [tuple(sample.positions.shape) for sample in samples]
            raise ValueError(f"stack takes one or more samples without a batch axis, (N, D), got {shapes}")
        sizes = {tuple(sample.image_size) for sample in samples}
        if len(sizes) > 1:
            raise ValueError(f"stack takes samples of one image size, got {sorted(sizes)}")
        slots = max(len(sample) for sample in samples)

        optional: dict[str, Any] = {}
        for name in ("scores", "scales", "angles", "descriptors"):
            values = [getattr(sample, name) for sample in samples]
            optional[name] = None if any(value is None for value in values) else pad_sequence(values, batch_first=True)
        return Keypoints(
            pad_sequence([sample.positions for sample in samples], batch_first=True),
            pad_sequence([sample.valid for sample in samples], batch_first=True),
            samples[0].image_size,
            padded=any(sample.padded or len(sample) < slots for sample in samples),
            **optional,
        )

    def _map(self, function: Callable[[Tensor], Tensor], kind: type[Keypoints] | None = None) -> Keypoints:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return (kind or type(self))(**values)


class KeypointSample(Keypoints):
    """One sample of a batch, ``keypoints[i]``.

    Unlike a batch it cannot be iterated over. It looks like a tensor without axes to functions that take a batch apart,
    such as MONAI's ``decollate_batch``, so that they leave the sample whole.

    Example:
        >>> keypoints = Keypoints(torch.zeros(2, 3, 2), torch.ones(2, 3).bool(), (8, 6))
        >>> [type(sample).__name__ for sample in keypoints]
        ['KeypointSample', 'KeypointSample']
    """

    __iter__ = None  # type: ignore[assignment]  # how Python marks a class that is not iterable, unlike its base
    ndim = 0

    def item(self) -> Keypoints:
        """The sample, detached from the autograd graph."""
        return self.detach()


torch.export.register_dataclass(Keypoints, serialized_type_name="kaf_layer.Keypoints")
torch.export.register_dataclass(KeypointSample, serialized_type_name="kaf_layer.KeypointSample")


def check_size(size: Sequence[int], keypoints: Keypoints) -> None:
    """Checks that a map may have a size.

    Raises:
        ValueError: if it has not one entry for each axis of the image, whole numbers from 1.
    """
    if not _is_size(size) or len(size) != len(keypoints.image_size):
        raise ValueError(
            "the map's size must have one entry for each axis of the image, whole numbers from 1, "
            f"got {size!r} for {keypoints.image_size=}"
        )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _is_size(size: object) -> bool:
    """Whether it holds whole numbers from 1. Exporters put symbols in their place, which are not looked at."""
    if not isinstance(size, Sequence) or isinstance(size, str):
        return False
    if torch.compiler.is_compiling():
        return True
    return not any(isinstance(s, (str, float)) or (isinstance(s, Integral) and int(s) < 1) for s in size)

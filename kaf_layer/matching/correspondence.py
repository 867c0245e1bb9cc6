"""Correspondences between two sets of keypoints, from their positions and descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from kaf_layer.checks import check_keypoints, check_tensors
from kaf_layer.keypoints import Keypoints
from kaf_layer.precision import at_least_float32

__all__ = ["Matches", "check_matches", "match_keypoints"]


@dataclass(eq=False)
class Matches:
    """The partners of the keypoints of two images, a and b, in both directions.

    The class is a pytree, as [Keypoints][kaf_layer.Keypoints] is.

    Args:
        indices: (B, N_a) long: for each slot of a the slot of its partner in b, or -1 for "no partner".
        inverse: (B, N_b) long: for each slot of b the slot of its partner in a, or -1.

    Raises:
        ValueError: if a shape or type does not fit.

    Example:
        >>> matches = Matches(torch.tensor([[1, -1]]), torch.tensor([[-1, 0, -1]]))
        >>> a = Keypoints(torch.zeros(1, 2, 2), torch.tensor([[True, True]]), (4, 4))
        >>> b = Keypoints(torch.zeros(1, 3, 2), torch.tensor([[True, False, True]]), (4, 4))
        >>> matches.among(a, b).indices.tolist()  # the partner is gone
        [[-1, -1]]
    """

    indices: Annotated[Tensor, "B N_a"]
    inverse: Annotated[Tensor, "B N_b"]

    def __post_init__(self) -> None:
        # Pytree transformations put objects other than tensors into the fields.
        if isinstance(self.indices, Tensor) and isinstance(self.inverse, Tensor):
            if self.indices.ndim != 2 or self.inverse.ndim != 2 or len(self.indices) != len(self.inverse):
                raise ValueError(
                    "indices must be (B, N_a) and inverse (B, N_b), "
                    f"got shapes {tuple(self.indices.shape)} and {tuple(self.inverse.shape)}"
                )
            if self.indices.dtype != torch.long or self.inverse.dtype != torch.long:
                raise ValueError(f"indices and inverse must be long, got {self.indices.dtype} and {self.inverse.dtype}")

    def to(self, *args: Any, **kwargs: Any) -> Matches:
        """Moves the indices like ``torch.Tensor.to``; they stay long."""
        return Matches(self.indices.to(*args, **kwargs).long(), self.inverse.to(*args, **kwargs).long())

    def pin_memory(self) -> Matches:
        """The same matches in page-locked memory; a ``DataLoader`` calls this."""
        return Matches(self.indices.pin_memory(), self.inverse.pin_memory())

    def among(self, a: Keypoints, b: Keypoints) -> Matches:
        """Keeps the matches of which both keypoints are valid, for example after an augmentation of either image.

        Args:
            a: the keypoints of the first images.
            b: the keypoints of the second images.
        """
        return Matches(_among(self.indices, a.valid, b.valid), _among(self.inverse, b.valid, a.valid))


def check_matches(matches: Matches) -> None:
    """Checks that an argument is ``Matches``.

    Raises:
        TypeError: if it is not, or does not hold tensors.
    """
    if not isinstance(matches, Matches):
        raise TypeError(f"matches must be Matches, got {type(matches).__name__}")
    check_tensors(**{"matches.indices": matches.indices, "matches.inverse": matches.inverse})


torch.export.register_dataclass(Matches, serialized_type_name="kaf_layer.Matches")


def match_keypoints(a: Keypoints, b: Keypoints, *, max_distance: float = 30.0, mutual: bool = True) -> Matches:
    """Matches each keypoint with the most similar one nearby (Section 3.2 of the paper).

    The candidates of a keypoint are the keypoints of the other image within a Manhattan distance. Its partner is the
    candidate with the nearest descriptor (L2). Use it for neighbouring slices of a volume, or images of one organ.

    Args:
        a: keypoints with descriptors, of B images.
        b: keypoints with descriptors, of B images of the same size.
        max_distance: the largest Manhattan distance, in pixels, inclusive.
        mutual: whether to keep a pair only if each is the other's best. Otherwise every keypoint on either side gets
            its best candidate, and a keypoint may be the partner of several.

    Returns:
        The partners of both sides, -1 where there is none and in slots that are not valid.

    Raises:
        TypeError: if a or b is not ``Keypoints``.
        ValueError: if descriptors are missing, or image sizes, batch sizes or descriptors do not fit.

    Example:
        >>> def keypoints(positions):
        ...     descriptors = torch.eye(len(positions))[None]
        ...     return Keypoints(torch.tensor([positions]), torch.ones(1, len(positions), dtype=torch.bool), (64, 64),
        ...                      descriptors=descriptors)
        >>> a, b = keypoints([[9.0, 9.0], [40.0, 5.0]]), keypoints([[12.0, 9.0], [4.0, 50.0]])
        >>> match_keypoints(a, b).indices  # the second pair is too far apart
        tensor([[ 0, -1]])
    """
    left, right = _descriptors(a, b)
    positions_a, positions_b = a.positions_in(a.image_size), b.positions_in(b.image_size)
    manhattan = (positions_a[:, :, None] - positions_b[:, None]).abs().sum(dim=-1)
    candidate = (manhattan <= max_distance) & a.valid[:, :, None] & b.valid[:, None]
    # Without a matrix product, whose rounding could confuse near duplicates.
    difference = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    difference = difference.masked_fill(~candidate, torch.inf)
    indices = _nearest(difference)
    inverse = _nearest(difference.mT)
    if mutual:
        indices, inverse = _mutual(indices, inverse), _mutual(inverse, indices)
    return Matches(indices, inverse)


def _nearest(difference: Annotated[Tensor, "B M N"]) -> Annotated[Tensor, "B M"]:
    """The column of each row's smallest value, or -1 where all are infinite."""
    if difference.shape[2] == 0:
        return difference.new_full(difference.shape[:2], -1, dtype=torch.long)
    smallest, index = difference.min(dim=2)
    return index.masked_fill(smallest == torch.inf, -1)


def _mutual(indices: Annotated[Tensor, "B M"], inverse: Annotated[Tensor, "B N"]) -> Annotated[Tensor, "B M"]:
    """The indices whose partners point back."""
    slots = torch.arange(indices.shape[1], device=indices.device)
    return indices.masked_fill(_at(inverse, indices, missing=-2) != slots, -1)


def _among(
    indices: Annotated[Tensor, "B M"], valid: Annotated[Tensor, "B M"], other: Annotated[Tensor, "B N"]
) -> Annotated[Tensor, "B M"]:
    if valid.shape != indices.shape:
        raise ValueError(
            f"matches must be of these keypoints, got {tuple(indices.shape)} of them for slots {tuple(valid.shape)}"
        )
    return indices.masked_fill(~valid | ~_at(other, indices, missing=False), -1)


def _at(values: Annotated[Tensor, "B N"], indices: Annotated[Tensor, "B M"], *, missing: int) -> Tensor:
    """The values (B, M) at the indices, ``missing`` where these are -1."""
    values = torch.cat([values, values.new_full((len(values), 1), missing)], dim=1)
    return values.gather(1, indices.where(indices >= 0, values.shape[1] - 1))


def _descriptors(a: Keypoints, b: Keypoints) -> tuple[Tensor, Tensor]:
    """The descriptors of both, without gradient, and zero in slots that are not valid."""
    check_keypoints(a=a, b=b)
    if a.descriptors is None or b.descriptors is None:
        missing = [name for name, keypoints in (("a", a), ("b", b)) if keypoints.descriptors is None]
        raise ValueError(
            f"a and b must have descriptors (detect with descriptors=True), got none in {' and '.join(missing)}"
        )
    # len(a) would make the batch size a constant under a compiler.
    if a.positions.shape[0] != b.positions.shape[0] or tuple(a.image_size) != tuple(b.image_size):
        raise ValueError(
            "a and b must be batches of the same number of images of the same size, "
            f"got {a.positions.shape=}, {a.image_size=}, {b.positions.shape=}, {b.image_size=}"
        )
    check_tensors(descriptors=a.descriptors)
    check_tensors(descriptors=b.descriptors)
    if a.descriptors.shape[2] != b.descriptors.shape[2]:
        raise ValueError(f"descriptors must have one length, got {a.descriptors.shape=} and {b.descriptors.shape=}")
    dtype = at_least_float32(a.descriptors.dtype)
    left, right = (
        kp.descriptors.detach().to(dtype).masked_fill(~kp.valid[..., None], 0.0)  # type: ignore[union-attr]
        for kp in (a, b)
    )
    return left, right

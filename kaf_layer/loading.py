"""Keypoints in data loaders and checkpoints: registers them with PyTorch's collation and safe loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from kaf_layer.keypoints import Keypoints, KeypointSample

__all__ = ["collate_keypoints"]


def collate_keypoints(samples: Sequence[Keypoints], *, collate_fn_map: Any = None) -> Keypoints:  # noqa: ARG001
    """Joins samples into a batch by ``Keypoints.stack``; a ``DataLoader`` calls it for keypoints.

    Importing the package registers it, so that ``torch.utils.data.default_collate``, and functions that use it such as
    MONAI's ``list_data_collate``, accept samples that hold keypoints. It also registers ``Keypoints`` as a type
    that ``torch.load`` may load with ``weights_only=True``.

    Args:
        samples: keypoints without a batch axis, as ``keypoints[i]`` gives them.
        collate_fn_map: what PyTorch passes to every such function; it is not used.

    Example:
        >>> keypoints = Keypoints(torch.zeros(3, 2), torch.ones(3).bool(), (8, 6))
        >>> sample = {"image": torch.zeros(1, 8, 6), "keypoints": keypoints}
        >>> batch = torch.utils.data.default_collate([sample, sample])
        >>> batch["keypoints"].positions.shape
        torch.Size([2, 3, 2])
    """
    return Keypoints.stack(samples)


default_collate_fn_map[Keypoints] = collate_keypoints
torch.serialization.add_safe_globals([Keypoints, KeypointSample])

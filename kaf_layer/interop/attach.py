"""attach: puts KAF layers into an existing network, without changing its code, names or weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kaf_layer.detection import KeypointDetector, SIFTDetector
from kaf_layer.interop.backbone import KAFBackbone
from kaf_layer.interop.forms import Form, TokenGrid
from kaf_layer.interop.submodules import (
    check_names,
    dry_run,
    find_image,
    find_submodules,
    has_channels_last,
    signature_of,
)
from kaf_layer.layer import KAFLayer

__all__ = ["attach"]


def attach(
    backbone: nn.Module,
    submodules: Mapping[str, int | None] | Iterable[str],
    *,
    detector: KeypointDetector | None = None,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    image: str | None = None,
    channels_last: bool | Collection[str] | None = None,
    tokens: TokenGrid | Mapping[str, TokenGrid] | None = None,
    outputs: Mapping[str, int | str] | None = None,
    **options: Any,
) -> KAFBackbone:
    """Puts a KAF layer behind submodules of any network.

    Each layer adds to the map that its submodule returns, times a learned gain that starts at zero. Before training,
    the output is identical to the original network's. See [KAFBackbone][kaf_layer.interop.KAFBackbone] for the result.

    Args:
        backbone: the network. It gets forward hooks, which do nothing when it is called by itself.
        submodules: names, as in ``backbone.named_modules()``, and the channels of their maps. Names without channels,
            or with None, need an ``example``. A submodule may return its map in a tuple, a list or a dictionary,
            whose other entries do not change.
        detector: finds keypoints in the image; ``SIFTDetector(descriptors=False)``, for images or volumes, if None.
        example: the backbone's input, a tuple of its inputs, or a dictionary of them by name. It is run once, in
            evaluation mode without gradients, to find the channels, their axis, and the number of spatial axes.
        image: the name of the argument of ``backbone.forward`` in which to detect keypoints. None means the first
            argument, in the order of that function's signature, that is or holds a tensor.
        channels_last: the names of the submodules whose maps are (B, *S, C), as in a Swin Transformer; True for all,
            False for none. None finds out from the ``example``, by the number of channels, and by the other axes,
            which have the image's size divided by a stride. Without an example it is False.
        tokens: the layout of tokens in the image, for submodules that return tokens (B, N, C) as in a vision
            Transformer: one [TokenGrid][kaf_layer.interop.TokenGrid] for all submodules, or one for each by name.
        outputs: the index or key of the map to use, by name, for submodules that return several maps.
        options: options of each [KAFLayer][kaf_layer.KAFLayer].

    Raises:
        ValueError: if a submodule does not exist (the message names the closest), is named twice, never runs or is
            compiled; if its channels are unknown or differ from those given; if it returns several maps; if the
            channels of the example's map may come first or last; or if the backbone has an argument ``keypoints``.

    Example:
        >>> from kaf_layer import GridDetector
        >>> backbone = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 3, stride=2))
        >>> images = torch.rand(1, 1, 24, 32)
        >>> model = attach(backbone, {"0": 8}, detector=GridDetector(8), depth=1)
        >>> torch.equal(model(images), backbone(images))
        True
        >>> model.remove_layers() is backbone
        True
    """
    submodules = [submodules] if isinstance(submodules, str) else submodules
    wanted = dict(submodules) if isinstance(submodules, Mapping) else dict.fromkeys(submodules)
    modules = find_submodules(backbone, list(wanted))
    last, outputs = _names(channels_last, wanted), outputs or {}
    grids = dict.fromkeys(wanted, tokens) if isinstance(tokens, TokenGrid) else dict(tokens or {})
    check_names(wanted, channels_last=last, tokens=grids, outputs=outputs)
    if example is not None:
        args, kwargs = _inputs(example)
        seen = find_image(image, list(signature_of(backbone, image).parameters), args, kwargs)
        forms = {name: Form(tokens=grids.get(name), output=outputs.get(name)) for name in wanted}
        for name, shape in dry_run(backbone, modules, forms, args, kwargs).items():
            axes = len(shape) - 2
            if name in grids:
                axes = options.get("spatial_dims", 2) if seen is None else seen.ndim - 2
                if seen is not None:
                    grids[name].of(shape[1], seen.shape[2:])
            elif channels_last is None and has_channels_last(name, shape, channels=wanted[name], image=seen):
                last.add(name)
            count = shape[-1 if name in grids or name in last else 1]
            if wanted[name] not in (None, count):
                raise ValueError(f"{name!r} must have the channels given, got {wanted[name]} for a map {shape}")
            wanted[name] = count
            options.setdefault("spatial_dims", axes)
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    layers = {}
    for name, channels in wanted.items():
        if channels is None:
            raise ValueError(f"give the channels of {name!r}, or an example to see them in, got {channels=}")
        layers[name] = KAFLayer(channels, fusion="add", **options).to(like)
    detector = detector or SIFTDetector(descriptors=False, spatial_dims=options.get("spatial_dims", 2))
    return KAFBackbone(
        backbone, layers, detector=detector, image=image, channels_last=last, tokens=grids, outputs=outputs
    )


def _inputs(example: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of the backbone, by position and by name."""
    if isinstance(example, Mapping):
        return (), example
    return example if isinstance(example, tuple) else (example,), {}


def _names(channels_last: bool | Collection[str] | None, wanted: Collection[str]) -> set[str]:
    if channels_last is None or isinstance(channels_last, bool):
        return set(wanted) if channels_last else set()
    return {channels_last} if isinstance(channels_last, str) else set(channels_last)

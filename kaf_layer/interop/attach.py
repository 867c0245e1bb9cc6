"""attach: KAF layers in a network that someone else wrote, with its code, names and weights as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from kaf_layer.detection import KeypointDetector, SIFTDetector
from kaf_layer.interop.submodules import (
    arguments_of,
    dry_run,
    find_image,
    find_submodules,
    first_map,
    has_channels_last,
    layer_key,
)
from kaf_layer.keypoints import Keypoints
from kaf_layer.layer import KAFLayer

__all__ = ["KAFBackbone", "attach"]


def attach(
    backbone: nn.Module,
    submodules: Mapping[str, int | None] | Iterable[str],
    *,
    detector: KeypointDetector | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
    image: str | None = None,
    channels_last: bool | Collection[str] | None = None,
    **options: Any,
) -> KAFBackbone:
    """Puts a KAF layer behind submodules of any network.

    Each layer adds to the map that its submodule returns, times a learned gain that starts at zero: until it is
    trained, the network's output is what it was. See :class:`KAFBackbone` for the result.

    Args:
        backbone: the network. It gets forward hooks, which do nothing when it is called by itself.
        submodules: names, as in ``backbone.named_modules()``, and the channels of their maps. Channels that are None,
            or names alone, need an ``example``. Where a submodule returns a tuple, a list or a dictionary,
            the first tensor in it is its map, and the others stay as they are.
        detector: finds keypoints in the image; ``SIFTDetector(descriptors=False)``, for images or volumes, if None.
        example: the backbone's input, or a tuple of its inputs: it is run once, in evaluation mode without
            gradients, to see the channels, where they are, and the number of spatial axes.
        image: the name of the argument of ``backbone.forward`` in which to detect; the first tensor if None.
        channels_last: the names of the submodules whose maps are (B, *S, C), as in a Swin transformer; True for all,
            False for none. None looks at the ``example``: where channels are as many as given, and the rest
            has the image's size but for a stride. Without an example it is False.
        options: of each :class:`~kaf_layer.KAFLayer`.

    Raises:
        ValueError: if there is no such submodule (the message names the closest), one is named
            twice, channels are neither given nor to be seen, or are not those given, channels of the example's map
            may come first or last, or the backbone has an argument ``keypoints``.

    Example:
        >>> from kaf_layer import GridDetector
        >>> backbone = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 3, stride=2))
        >>> images = torch.rand(1, 1, 24, 32)
        >>> model = attach(backbone, {"0": 8}, detector=GridDetector(8), depth=1)
        >>> torch.equal(model(images), backbone(images))
        True
        >>> model.detach() is backbone
        True
    """
    submodules = [submodules] if isinstance(submodules, str) else submodules
    wanted = dict(submodules) if isinstance(submodules, Mapping) else dict.fromkeys(submodules)
    modules = find_submodules(backbone, list(wanted))
    last = _names(channels_last, wanted)
    if example is not None:
        args = example if isinstance(example, tuple) else (example,)
        seen = find_image(image, arguments_of(backbone, image), args, {})
        for name, shape in dry_run(backbone, modules, args).items():
            if channels_last is None and has_channels_last(name, shape, channels=wanted[name], image=seen):
                last.add(name)
            count = shape[-1 if name in last else 1]
            if wanted[name] not in (None, count):
                raise ValueError(f"{name!r} must have the channels given, got {wanted[name]} for a map {shape}")
            wanted[name] = count
            options.setdefault("spatial_dims", len(shape) - 2)
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    layers = {}
    for name, channels in wanted.items():
        if channels is None:
            raise ValueError(f"give the channels of {name!r}, or an example to see them in, got {channels=}")
        layers[name] = KAFLayer(channels, fusion="add", **options).to(like)
    detector = detector or SIFTDetector(descriptors=False, spatial_dims=options.get("spatial_dims", 2))
    return KAFBackbone(backbone, layers, detector=detector, image=image, channels_last=last)


def _names(channels_last: bool | Collection[str] | None, wanted: Collection[str]) -> set[str]:
    if channels_last is None or isinstance(channels_last, bool):
        return set(wanted) if channels_last else set()
    names = {channels_last} if isinstance(channels_last, str) else set(channels_last)
    if not names <= set(wanted):
        raise ValueError(f"channels_last must name submodules with a layer, got {channels_last=} for {list(wanted)}")
    return names


class KAFBackbone(nn.Module):
    """A network with KAF layers behind some of its submodules; :func:`attach` makes it.

    Call it like the network: it takes the same arguments and returns the same output. Given ``keypoints=...`` it
    does not detect them.

    Its state dict holds the network's under ``backbone.`` and the layers' under ``layers.``, with dots
    in the submodules' names as underscores. A checkpoint of the network loads into ``model.backbone``, which called
    by itself is the network without layers. To train the layers alone, freeze ``model.backbone``.

    ``torch.utils.checkpoint`` may hold the whole, or parts of the network that contain no submodule with a layer:
    it could not know the keypoints. For the layers' own activations there is ``recompute=True``.

    Args:
        backbone: the network.
        layers: by the names of the submodules, each with ``fusion="add"``.
        detector: finds keypoints in the image.
        image: the name of the argument of ``backbone.forward`` that is the image; the first tensor if None.
        channels_last: the names of the submodules whose maps are (B, *S, C).

    Raises:
        ValueError: in :func:`attach`'s cases; when called, if a submodule returns no map of the
            image, or does not run exactly once, or there is no image.

    Example:
        >>> from kaf_layer import GridDetector, Keypoints
        >>> backbone = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 3, stride=2))
        >>> model = KAFBackbone(backbone, {"0": KAFLayer(8, fusion="add")}, detector=GridDetector(8))
        >>> keypoints = Keypoints(torch.rand(1, 5, 2) * 24, torch.ones(1, 5, dtype=torch.bool), (24, 32))
        >>> model(torch.rand(1, 1, 24, 32), keypoints=keypoints).shape
        torch.Size([1, 2, 11, 15])
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Mapping[str, KAFLayer],
        *,
        detector: KeypointDetector,
        image: str | None = None,
        channels_last: Collection[str] = (),
    ) -> None:
        super().__init__()
        self._arguments = arguments_of(backbone, image)
        modules = find_submodules(backbone, list(layers))
        self.backbone = backbone
        self.layers = nn.ModuleDict({layer_key(name): layer for name, layer in layers.items()}).train(backbone.training)
        self.detector = detector
        self.image = image
        self.training = backbone.training
        self._pass = _Pass()
        self._handles = [
            module.register_forward_hook(_Fusion(name, self.layers, self._pass, last=name in channels_last))
            for name, module in modules.items()
        ]

    def forward(self, *args: Any, keypoints: Keypoints | None = None, **kwargs: Any) -> Any:
        """The backbone's output for the backbone's arguments.

        Args:
            args: the backbone's.
            keypoints: of the image; None detects them.
            kwargs: the backbone's.
        """
        if self._pass.keypoints is not None:
            raise RuntimeError("another forward pass is under way, in another thread or around this one: use copies")
        if keypoints is None:
            found = find_image(self.image, self._arguments, args, kwargs)
            if found is None:
                raise ValueError(
                    f"there is no image to detect keypoints in: give {self.image or 'image'}= or keypoints="
                )
            keypoints = self.detector(found)
        self._pass.keypoints, self._pass.fused = keypoints, []
        try:
            output = self.backbone(*args, **kwargs)
            if len(self._pass.fused) != len(self.layers):
                raise ValueError(f"each submodule with a layer must run, but only {self._pass.fused} did")
        finally:
            self._pass.keypoints = None
        return output

    def detach(self) -> nn.Module:
        """Takes the hooks away and returns the backbone, which is then as it was."""
        for handle in self._handles:
            handle.remove()
        return self.backbone


class _Pass:
    """What hooks share of the forward pass under way: its keypoints, and which submodules have been fused."""

    def __init__(self) -> None:
        self.keypoints: Keypoints | None = None
        self.fused: list[str] = []


class _Fusion:
    """A forward hook that fuses a submodule's map; a class, since closures cannot be pickled."""

    def __init__(self, name: str, layers: nn.ModuleDict, state: _Pass, *, last: bool) -> None:
        self.name, self.layers, self.state, self.last = name, layers, state, last

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        keypoints = self.state.keypoints
        if keypoints is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
                raise RuntimeError(
                    f"{self.name!r} is run again in the backward pass, by activation checkpointing around it, where "
                    "the keypoints are no longer known: checkpoint the whole network, or parts without a KAF layer"
                )
            return output
        if self.name in self.state.fused:
            raise ValueError(f"{self.name!r} runs more than once in a forward pass: name what runs once")
        self.state.fused.append(self.name)
        leaves, spec = tree_flatten(output)
        index, features = first_map(self.name, leaves)
        if self.last:
            features = features.movedim(-1, 1)
        try:
            fused = self.layers[layer_key(self.name)](features, keypoints).features
        except ValueError as error:
            axes = "(B, *S, C)" if self.last else "(B, C, *S), or be named in channels_last"
            raise ValueError(f"{self.name!r} must return a map of the image {axes}: {error}") from error
        leaves[index] = fused.movedim(1, -1) if self.last else fused
        return tree_unflatten(leaves, spec)

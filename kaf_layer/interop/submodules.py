"""Finding submodules of a network by name, and the shapes of their maps."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kaf_layer.interop.forms import Form, find_map

__all__ = ["check_names", "dry_run", "find_image", "find_submodules", "has_channels_last", "layer_key", "signature_of"]


def layer_key(name: str) -> str:
    """A submodule's name as a key of a ModuleDict."""
    return name.replace(".", "_")


def find_image(
    image: str | None, arguments: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The argument named ``image``, or the first that is or holds a tensor, in the order of the backbone's signature.

    None if there is none, or the one that is named is no tensor.
    """
    if image is None:
        named = [kwargs[name] for name in arguments if name in kwargs]
        others = [value for name, value in kwargs.items() if name not in arguments]
        return next((leaf for leaf in tree_leaves((args, named, others)) if isinstance(leaf, Tensor)), None)
    position = arguments.index(image)
    found = args[position] if position < len(args) else kwargs.get(image)
    return found if isinstance(found, Tensor) else None


def signature_of(backbone: nn.Module, image: str | None = None) -> inspect.Signature:
    """The backbone's, the image among its arguments."""
    signature = inspect.signature(backbone.forward)
    arguments = list(signature.parameters)
    if "keypoints" in arguments:
        raise ValueError(
            f"the backbone must have no argument named keypoints, which attach adds, got the arguments {arguments}"
        )
    if image is not None and image not in arguments:
        raise ValueError(f"image must name an argument of the backbone, got {image=} and the arguments {arguments}")
    return signature


def check_names(names: Collection[str], **options: Collection[str]) -> None:
    """Checks that options speak of submodules that have a layer."""
    for option, given in options.items():
        if not set(given) <= set(names):
            raise ValueError(
                f"{option} must name submodules with a layer, got {sorted(set(given) - set(names))} for {list(names)}"
            )


def has_channels_last(name: str, shape: torch.Size, *, channels: int | None, image: Tensor | None) -> bool:
    """Whether a map is (B, *S, C): by the number of its channels, if known, and by the image's size."""
    first, last = channels in (None, shape[1]), channels in (None, shape[-1])
    if image is None or image.ndim != len(shape):
        return last and not first
    fits_first = _fit(shape[2:], image.shape[2:]) if first else 0
    fits_last = _fit(shape[1:-1], image.shape[2:]) if last else 0
    if fits_first == fits_last > 0:
        raise ValueError(
            f"the map of {name!r} could be (B, C, *S) or (B, *S, C): give channels_last=True, False or the names "
            f"of those whose channels come last, or an example with H != W, got a map of shape {tuple(shape)} for "
            f"images of shape {tuple(image.shape)}"
        )
    return fits_last > fits_first


def _fit(size: torch.Size, image_size: torch.Size) -> int:
    """How well a map's size is the image's: 3 if divided or multiplied by a number, 2 if rounded, 1 if by several."""
    best = 0
    for pairs in (list(zip(image_size, size, strict=True)), list(zip(size, image_size, strict=True))):
        strides = [{s for s in range(1, a + 1) if abs(a - b * s) < s} for a, b in pairs]
        if all(strides):
            common = set.intersection(*strides)
            exact = any(all(a == b * s for a, b in pairs) for s in common)
            best = max(best, 1 + bool(common) + exact)
    return best


def find_submodules(backbone: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The submodules by name."""
    modules = dict(backbone.named_modules(remove_duplicate=False))
    for name in names:
        if not name or name not in modules:
            closest = difflib.get_close_matches(name, modules, cutoff=0.0)
            raise ValueError(f"the backbone has no submodule {name!r}; the closest are {closest}")
    for of, labels in (
        ("submodule", [id(modules[name]) for name in names]),
        ("key", [layer_key(name) for name in names]),
    ):
        if len(set(labels)) < len(names):
            raise ValueError(f"every name must have a {of} of its own, got {names}")
    if not names:
        raise ValueError("name a submodule or more, got none")
    for name in names:
        _check_runs(name, modules)
    return {name: modules[name] for name in names}


def _check_runs(name: str, modules: Mapping[str, nn.Module]) -> None:
    """Checks that a submodule's hooks are called when it runs."""
    module = modules[name]
    if type(module).forward is nn.Module.forward:
        inside = [f"{name}.{child}" for child, _ in module.named_children()]
        raise ValueError(f"{name!r} is a {type(module).__name__}, which never runs itself: name one of {inside}")
    parts = name.split(".")
    for outer in (".".join(parts[:end]) for end in range(len(parts) + 1)):
        if "_orig_mod" in modules[outer]._modules or modules[outer]._compiled_call_impl is not None:
            where = f"its submodule {outer!r}" if outer else "it"
            raise ValueError(
                f"backbone must not be compiled, but {where} is: attach to the network itself, which torch.compile "
                "keeps as ._orig_mod, then compile the result"
            )


def dry_run(
    backbone: nn.Module,
    modules: Mapping[str, nn.Module],
    forms: Mapping[str, Form],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, torch.Size]:
    """The shapes of the submodules' maps, or of their tokens."""
    shapes: dict[str, torch.Size] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            leaves, _, index = find_map(name, output, forms[name])
            shapes[name] = leaves[index].shape

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in modules.items()]
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            backbone(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    missing = modules.keys() - shapes.keys()
    if missing:
        raise ValueError(f"each submodule with a layer must run, but {sorted(missing)} did not")
    return shapes

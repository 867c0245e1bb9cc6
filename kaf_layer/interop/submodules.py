"""Finding submodules of a network by name, and the maps that they return."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["dry_run", "find_submodules", "first_map", "layer_key"]


def layer_key(name: str) -> str:
    """A submodule's name as a key of a ModuleDict."""
    return name.replace(".", "_")


def first_map(name: str, leaves: list[Any]) -> tuple[int, Tensor]:
    """The first tensor among what a submodule returns, and its index."""
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.ndim < 4 or not leaf.is_floating_point():
                raise ValueError(f"{name!r} must return a map (B, C, *S), got {leaf.shape=} and {leaf.dtype=}")
            return index, leaf
    raise ValueError(f"{name!r} must return a map (B, C, *S), got no tensor but {[type(leaf) for leaf in leaves]}")


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
    return {name: modules[name] for name in names}


def dry_run(
    backbone: nn.Module, modules: dict[str, nn.Module], example: Tensor | tuple[Any, ...]
) -> dict[str, torch.Size]:
    """The shapes of the submodules' maps."""
    shapes: dict[str, torch.Size] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            shapes[name] = first_map(name, tree_leaves(output))[1].shape

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in modules.items()]
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            backbone(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    missing = modules.keys() - shapes.keys()
    if missing:
        raise ValueError(f"each submodule with a layer must run, but {sorted(missing)} did not")
    return shapes

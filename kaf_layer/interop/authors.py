"""Loads checkpoints of the paper's authors into the layer, the matcher, and the UNets of ``examples/unet.py``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from kaf_layer.attention import Attention

__all__ = ["AuthorsKeys", "load_authors_state_dict"]

_HEADS = 4  # of every attention in the authors' code
_UNUSED = re.compile(r"superglue\.(final_proj\.(weight|bias)|bin_score)$")
_POSITION_ENCODER = [*(f"{kind}.{i}" for i in range(4) for kind in ("linears", "norms", "")), "out"]
_DIFFUSION = {"0": "conv1", "1": "norm", "3": "conv2"}
_BLOCK = {
    "attn.proj.0": "attention.qkv.0",
    "attn.proj.1": "attention.qkv.1",
    "attn.proj.2": "attention.qkv.2",
    "attn.merge": "attention.out",
    "mlp.0": "expand",
    "mlp.1": "norm",
    "mlp.3": "contract",
}

# Each rule maps a part of a name in the authors' code to a part of ours.
_RULES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"feature_mlp(?=\.)", lambda _: "embed"),
    (r"superglue(?=\.)", lambda _: "transformer"),
    (r"kenc\.encoder\.(\d+)", lambda m: f"position_encoder.{_POSITION_ENCODER[int(m[1])]}"),
    (r"gnn\.layers\.(\d+)\.(attn\.\w+(?:\.\d)?|mlp\.\d)", lambda m: f"blocks.{m[1]}.{_BLOCK[m[2]]}"),
    (r"final_proj(?=\.)", lambda _: "out"),
    (r"bin_score$", lambda _: "dustbin"),
    (r"diffusion_cnn\.(\d)", lambda m: f"diffusion.{_DIFFUSION[m[1]]}"),
    (r"contr_(\d)_(\d)", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}"),
    (r"graph_(\d)", lambda m: f"layers.{int(m[1]) - 1}"),
    (r"center\.(\d)", lambda m: f"stages.4.{int(m[1]) + 1}"),
    (r"upscale(\d)", lambda m: f"ups.{5 - int(m[1])}"),
    (r"expand_(\d)_(\d)", lambda m: f"blocks.{4 - int(m[1])}.{int(m[2]) - 1}"),
    (r"head\.0", lambda _: "head"),
)


class AuthorsKeys(NamedTuple):
    """The authors' keys that were loaded, and those left out because their code never uses them."""

    taken: list[str]
    left: list[str]


@torch.no_grad()
def load_authors_state_dict(module: nn.Module, state_dict: Mapping[str, Tensor]) -> AuthorsKeys:
    """Loads a state dict with the names of the authors' code, strictly.

    Args:
        module: a [KAFLayer][kaf_layer.KAFLayer] with ``block="propagation", sampling="nearest"``
            and twice the authors' ``num_layers`` as depth (their layers are pairs of blocks), a
            UNet of ``examples/unet.py`` with such layers, or a [KeypointMatcher][kaf_layer.KeypointMatcher].
        state_dict: the authors' tensors by name.

    Returns:
        The keys that were loaded and those left out. The latter are ``final_proj`` and ``bin_score`` of each layer,
        263,172 parameters in a UNet with four layers, which do not affect the output of the authors' code.

    Raises:
        ValueError: if keys are missing, unknown or of the wrong shape, or if attention does not have 4 heads.

    Example:
        >>> from kaf_layer import KAFLayer
        >>> layer = KAFLayer(16, depth=0, block="propagation", sampling="nearest")
        >>> load_authors_state_dict(layer, {"feature_mlp.weight": torch.zeros(256, 8, 1)})
        Traceback (most recent call last):
        ...
        ValueError: feature_mlp.weight: expected shape (256, 16, 1), got (256, 8, 1)
    """
    targets = _targets(module)
    left = [key for key in state_dict if _UNUSED.search(key)]
    taken = {key: _rename(key) for key in state_dict if key not in left}
    for key, name in taken.items():
        if name in targets and state_dict[key].shape != _authors_shape(targets[name]):
            expected, shape = _authors_shape(targets[name]), tuple(state_dict[key].shape)
            raise ValueError(f"{key}: expected shape {expected}, got {shape}")
    heads = {m.num_heads for m in module.modules() if isinstance(m, Attention)}
    if heads - {_HEADS}:
        raise ValueError(f"the authors' attention has {_HEADS} heads, make the module with as many, got {heads}")
    unknown = [key for key, name in taken.items() if name not in targets]
    missing = sorted(targets.keys() - taken.values())
    if unknown or missing:
        raise ValueError(
            f"the state dict is not this module's (is it within another?): no place for {len(unknown)} keys, such as "
            f"{unknown[:5]}, and nothing for {len(missing)}, such as {missing[:5]}"
        )
    for key, name in taken.items():
        targets[name].copy_(_convert(name, state_dict[key]).view_as(targets[name]))
    return AuthorsKeys(list(taken), left)


def _targets(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors by name, with queries, keys and values separate, as in the authors' code."""
    targets = {}
    for name, tensor in module.state_dict().items():
        parts = tensor.chunk(3) if ".qkv." in name else ()
        targets.update({name.replace("qkv", f"qkv.{i}"): part for i, part in enumerate(parts)} or {name: tensor})
    return targets


def _rename(key: str) -> str:
    for pattern, replacement in _RULES:
        key = re.sub(rf"(?<![a-z]){pattern}", replacement, key)
    return key


def _authors_shape(target: Tensor) -> tuple[int, ...]:
    """Their linear layers are convolutions of width 1."""
    return (*target.shape, 1) if target.ndim == 2 else tuple(target.shape)


def _convert(name: str, value: Tensor) -> Tensor:
    """Their heads interleave the channels: channel c is component c // 4 of head c % 4. Ours are contiguous."""
    if ".qkv." in name:
        return rearrange(value, "(component head) ... -> (head component) ...", head=_HEADS)
    if name.endswith("attention.out.weight"):
        return rearrange(value, "out (component head) 1 -> out (head component)", head=_HEADS)
    return value

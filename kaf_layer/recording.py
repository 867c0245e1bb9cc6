"""Attention weights on request: how much each keypoint takes from each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from kaf_layer.attention import Attention, KeypointTransformer
from kaf_layer.keypoints import Keypoints

__all__ = ["record_attention"]


@contextmanager
def record_attention(module: nn.Module) -> Iterator[dict[str, Annotated[Tensor, "B L H N N"]]]:
    """Records the attention weights of every KAF layer that runs inside the ``with`` block.

    It works for every module that contains a [KeypointTransformer][kaf_layer.KeypointTransformer]: a
    [KAFLayer][kaf_layer.KAFLayer], a [KAFEncoder][kaf_layer.KAFEncoder], or a network made by
    [attach][kaf_layer.interop.attach.attach]. Outputs do not change. Outside the block nothing changes: fused attention
    never holds these weights.

    Inside the block, compiled modules run without their compiler. If a layer runs more than once, its last pass counts.

    Args:
        module: the network. Both kinds of attention block are recorded.

    Yields:
        A dictionary, empty at first, which each forward pass fills. Its keys are the names of the transformers in
        ``module.named_modules()``, in the order in which they run. Its values are (B, L, H, N, N): samples, blocks,
        heads, the keypoint that attends, and the keypoint that is attended to. They carry no gradient. The last axis
        sums to one. Rows and columns of slots that are not valid are zero.

    Raises:
        ValueError: if the module has no keypoint transformer with at least one block.
        RuntimeError: if none of them ran inside the block.

    Example:
        >>> from kaf_layer import KAFLayer
        >>> layer = KAFLayer(16, embed_dim=32, depth=2, num_heads=4)
        >>> keypoints = Keypoints(torch.rand(1, 5, 2) * 8, torch.arange(5)[None] < 3, (8, 12))
        >>> with record_attention(layer) as attention:
        ...     features, tokens = layer(torch.rand(1, 16, 4, 6), keypoints)
        >>> attention["transformer"].shape
        torch.Size([1, 2, 4, 5, 5])
        >>> attention["transformer"].mean(dim=(1, 2)).sum(dim=-1).round(decimals=4)  # two slots are padding
        tensor([[1., 1., 1., 0., 0.]])
    """
    transformers = {name: m for name, m in module.named_modules() if isinstance(m, KeypointTransformer) and m.blocks}
    if not transformers:
        raise ValueError(f"the module must contain a KAF layer with attention blocks, got {type(module).__name__}")
    recorded: dict[str, Tensor] = {}
    handles = [handle for name, t in transformers.items() for handle in _Recorder(name, recorded).listen(t)]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recorded
    finally:
        for handle in handles:
            handle.remove()
    if not recorded:
        raise RuntimeError(f"no KAF layer ran inside the block, expected one or more of {list(transformers)}")


class _Recorder:
    """Forward hooks of one transformer and of the attention in its blocks."""

    def __init__(self, name: str, recorded: dict[str, Tensor]) -> None:
        self.name, self.recorded = name, recorded
        self.blocks: list[Tensor] = []

    def listen(self, transformer: KeypointTransformer) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield transformer.register_forward_pre_hook(self.begin)
        for module in transformer.modules():
            if isinstance(module, Attention):
                yield module.register_forward_hook(self.attend)
        yield transformer.register_forward_hook(self.end, with_kwargs=True)

    def begin(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        self.blocks = []

    @torch.no_grad()
    def attend(self, module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
        assert isinstance(module, Attention)
        self.blocks.append(module.weights(*args))

    def end(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Tensor) -> None:
        keypoints: Keypoints = kwargs["keypoints"] if "keypoints" in kwargs else args[1]
        between = keypoints.valid[:, :, None] & keypoints.valid[:, None]
        self.recorded[self.name] = torch.stack(self.blocks, dim=1).masked_fill(~between[:, None, None], 0.0)

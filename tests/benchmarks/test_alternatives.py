"""The layers that KAF layers are compared with compute what their papers say, and are counted by closed forms."""

import pytest
import torch
import torch.nn.functional as F
from common import random_keypoints

from benchmarks.common.measuring import count_flops
from benchmarks.cost import alternatives

N, C = 24 * 32, 256
KEYPOINTS = random_keypoints((48, 64), (5, 5), dtype=torch.float32)


def test_non_local_block_is_softmax_attention() -> None:
    torch.manual_seed(0)
    block, x = alternatives.NonLocal(8).double(), torch.randn(2, 8, 4, 6, dtype=torch.float64)
    query, key, value = (part(x).flatten(2) for part in (block.query, block.key, block.value))
    mixed = torch.einsum("bij,bcj->bci", torch.einsum("bci,bcj->bij", query, key).softmax(-1), value)
    torch.testing.assert_close(block(x, KEYPOINTS), x + block.out(mixed.unflatten(2, (4, 6))))


def test_deformable_attention_samples_where_it_says() -> None:
    torch.manual_seed(0)
    layer, x = alternatives.Deformable(8, heads=2, points=1), torch.randn(1, 8, 4, 6)
    torch.nn.init.zeros_(layer.offsets.weight)
    layer.offsets.bias.data = torch.tensor([2 / 6, 0.0] * 2)  # one cell to the right, for both heads
    moved = F.pad(layer.value(x), (0, 1))[..., 1:]
    torch.testing.assert_close(layer(x, KEYPOINTS), x + layer.out(moved))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (alternatives.NonLocal(C), 2 * N * C * C // 2 * 4 + 2 * 2 * N * N * C // 2),
        (alternatives.Deformable(C), 2 * N * C * (2 * C + 3 * 8 * 4)),
        (alternatives.PointHead(C, classes=4), 2 * KEYPOINTS.positions.shape[1] * (3 * C * C + C * 4)),
    ],
    ids=["non-local", "deformable", "points"],
)
def test_flops(layer: torch.nn.Module, expected: int) -> None:
    assert count_flops(lambda: layer(torch.rand(1, C, 24, 32), KEYPOINTS[:1])) == expected


def test_strided_attention_reaches_everywhere() -> None:
    layer, x = alternatives.StridedAttention(16, factor=2, depth=1), torch.rand(1, 16, 8, 8, requires_grad=True)
    layer(x, KEYPOINTS)[0, :, 0, 0].square().sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, -1, -1].abs().sum() > 0

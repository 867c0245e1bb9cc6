"""Recorded attention weights against a softmax written out in float64, one keypoint at a time."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from common import fill_padding, random_keypoints
from test_attention import layer_norm, randomise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from examples.unet import KAFUNet
from kaf_layer import KAFLayer, KeypointMatcher, KeypointTransformer, attach, record_attention
from kaf_layer.attention import Attention

SMALL = {"depth": 2, "num_heads": 2}


def naive_weights(attention: Attention, tokens: Tensor) -> list[list[list[float]]]:
    """By head, by query: exp(q.k / sqrt(d)) over the sum of these, of the valid tokens of one sample."""
    width = tokens.shape[-1] // attention.num_heads
    projected = tokens @ attention.qkv.weight.T + attention.qkv.bias
    result = []
    for head in range(attention.num_heads):
        first = head * width
        queries, keys = (projected[:, offset + first : offset + first + width] for offset in (0, tokens.shape[-1]))
        rows = []
        for query in queries.tolist():
            products = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys.tolist()]
            terms = [math.exp(product / math.sqrt(width)) for product in products]
            rows.append([term / sum(terms) for term in terms])
        result.append(rows)
    return result


@pytest.mark.parametrize("block", ["transformer", "propagation"])
@pytest.mark.parametrize("image_size", [(12, 20), (4, 6, 8)])
def test_weights_against_the_softmax_written_out(block: str, image_size: tuple[int, ...]) -> None:
    keypoints = random_keypoints(image_size, (5, 0, 3))  # NaN where not valid
    options = {"block": block, "position": "absolute", "spatial_dims": len(image_size)}
    transformer = KeypointTransformer(8, **SMALL, **options).double().eval()
    randomise(transformer)
    tokens = fill_padding(torch.randn(*keypoints.valid.shape, 8, dtype=torch.float64), keypoints)
    with record_attention(transformer) as recorded:
        transformer(tokens, keypoints)
    weights = recorded[""]
    assert weights.shape == (3, 2, 2, keypoints.valid.shape[1], keypoints.valid.shape[1])
    assert not weights.requires_grad
    encoded = transformer.position_encoder(keypoints)
    for sample, valid in enumerate(keypoints.valid):
        x = tokens[sample : sample + 1, valid] + encoded[sample : sample + 1, valid]
        all_valid = torch.ones(x.shape[:2], dtype=torch.bool)
        for layer, inner in enumerate(transformer.blocks if valid.any() else []):
            normed = layer_norm(inner.attention_norm, x) if block == "transformer" else x
            expected = torch.tensor(naive_weights(inner.attention, normed[0]), dtype=torch.float64)
            actual = weights[sample, layer][:, valid][:, :, valid]
            torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
            torch.testing.assert_close(actual.sum(-1), torch.ones_like(actual[..., 0]), atol=1e-12, rtol=0)
            x = inner(x, all_valid, None)
        assert weights[sample][:, :, ~valid].eq(0).all()
        assert weights[sample][..., ~valid].eq(0).all()
        assert weights[sample].sum().item() == pytest.approx(2 * 2 * valid.sum().item())


def networks() -> dict[str, Callable[[], tuple[nn.Module, Tensor, list[str]]]]:
    image, features = torch.rand(2, 1, 32, 48), torch.rand(2, 4, 16, 24)
    options = {"embed_dim": 8, **SMALL}

    def attached() -> nn.Module:
        return attach(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)), {"1": 2, "0": 4}, **options)

    return {
        "layer": lambda: (KAFLayer(4, **options), features, ["transformer"]),
        "recompute": lambda: (KAFLayer(4, **options, recompute=True), features, ["transformer"]),
        "unet": lambda: (
            KAFUNet(1, 2, width=4, levels=3, **options),
            image,
            ["encoder.layers.0.transformer", "encoder.layers.1.transformer"],
        ),
        "attached": lambda: (attached(), image, ["layers.0.transformer", "layers.1.transformer"]),
    }


@pytest.mark.parametrize("name", networks())
def test_recording_changes_no_network_and_leaves_nothing_behind(name: str) -> None:
    torch.manual_seed(0)
    module, inputs, names = networks()[name]()
    plain = copy.deepcopy(module)
    keypoints = random_keypoints((32, 48), (6, 0), dtype=torch.float32)
    with record_attention(module) as recorded:
        output = module(inputs, keypoints=keypoints)
        loss = sum(value.square().mean() for value in (output if isinstance(output, tuple) else (output,)))
        loss.backward()  # with recompute=True each block runs again
    assert list(recorded) == names  # in the order in which they run
    assert all(value.shape == (2, 2, 2, 8, 8) for value in recorded.values())
    expected = plain(inputs, keypoints=keypoints)
    sum(value.square().mean() for value in (expected if isinstance(expected, tuple) else (expected,))).backward()
    torch.testing.assert_close(output, expected, atol=0, rtol=0)
    for actual, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, other.grad, atol=0, rtol=0)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), atol=0, rtol=0)
    hooks = lambda m: [(len(s._forward_hooks), len(s._forward_pre_hooks)) for s in m.modules()]  # noqa: E731
    assert hooks(module) == hooks(plain)


def test_the_last_pass_counts_and_half_precision_is_fine() -> None:
    layer = KAFLayer(4, embed_dim=8, **SMALL)
    few, many = (random_keypoints((8, 12), counts, dtype=torch.float32) for counts in ((2, 0), (5, 3)))
    with record_attention(layer) as recorded, torch.autocast("cpu", torch.bfloat16):
        layer(torch.rand(2, 4, 8, 12), few)
        assert recorded["transformer"].shape[-1] == 4
        layer(torch.rand(2, 4, 8, 12), many)
    weights = recorded["transformer"]
    assert weights.shape[-1] == 7
    torch.testing.assert_close(weights.sum(-1)[many.valid[:, None, None].expand(weights.shape[:-1])].mean().item(), 1.0)


def test_compiled_networks_are_recorded_and_stay_compiled() -> None:
    torch.compiler.reset()
    layer = KAFLayer(4, embed_dim=8, **SMALL).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    keypoints, features = random_keypoints((8, 12), (5, 3), dtype=torch.float32), torch.rand(2, 4, 8, 12)
    expected = compiled(features, keypoints)
    with record_attention(compiled) as recorded:
        torch.testing.assert_close(compiled(features, keypoints), expected, atol=1e-6, rtol=1e-5)
    assert [value.shape for value in recorded.values()] == [(2, 2, 2, 7, 7)]
    compiled(features, keypoints)
    assert counter.frame_count == 1


def test_errors() -> None:
    layer = KAFLayer(4, embed_dim=8, **SMALL)
    for module in (nn.Conv2d(1, 1, 1), KeypointMatcher(8), KeypointTransformer(8, depth=0)):
        with (
            pytest.raises(ValueError, match=f"attention blocks, got {type(module).__name__}"),
            record_attention(module),
        ):
            pass
    with pytest.raises(RuntimeError, match=r"no KAF layer ran.*\['transformer'\]"), record_attention(layer):
        pass
    with pytest.raises(KeyError, match="mistake"), record_attention(layer) as recorded:
        recorded["a mistake inside the block is raised as it is"]

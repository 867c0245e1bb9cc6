"""KAFLayer and KAFEncoder: composition, identity, precision, compilation and errors."""

import pytest
import torch
import torch.nn.functional as F
from common import random_keypoints
from torch import Tensor, nn
from torch.export import Dim

from kaf_layer import KAFEncoder, KAFLayer, Keypoints, sample_keypoints, scatter_keypoints

SMALL = {"embed_dim": 16, "depth": 2, "hidden_channels": 8}
KEYPOINTS = random_keypoints((12, 20), (7, 0, 4), dtype=torch.float32)


def map_of(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, channels, 6, 10, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_steps_of_figure_1(fusion: str) -> None:
    layer = KAFLayer(4, fusion=fusion, **SMALL).double().eval()
    gain = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    if fusion == "add":
        layer.load_state_dict({"gain": gain}, strict=False)
    features = map_of(4, torch.float64)
    sampled = sample_keypoints(features, KEYPOINTS)
    tokens = layer.transformer(layer.embed(sampled), KEYPOINTS.resize((6, 10)))
    hidden = layer.diffusion.conv1(scatter_keypoints(tokens, KEYPOINTS, (6, 10)))
    diffused = layer.diffusion.conv2(layer.diffusion.norm(hidden).relu())
    added = features + gain[:, None, None] * diffused
    fused = torch.cat([features, diffused], dim=1) if fusion == "concat" else added
    output = layer(features, KEYPOINTS)
    torch.testing.assert_close(output.features, fused)
    torch.testing.assert_close(output.tokens, tokens)


@pytest.mark.parametrize("training", [False, True])
def test_add_starts_as_the_exact_identity(training: bool) -> None:
    features = map_of(4)
    assert torch.equal(KAFLayer(4, fusion="add", **SMALL).train(training)(features, KEYPOINTS).features, features)


def test_addition_grows_at_a_bounded_rate() -> None:
    """A step of Adam adds no more than the learning rate times the diffused map, however many inputs that has."""
    layer = KAFLayer(4, fusion="add", **SMALL)
    features = map_of(4)
    diffused = layer.diffusion(layer(features, KEYPOINTS).tokens, KEYPOINTS, (6, 10))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    (layer(features, KEYPOINTS).features * torch.randn(3, 4, 6, 10)).sum().backward()
    optimizer.step()
    added = layer(features, KEYPOINTS).features - features
    assert 0 < added.abs().max() <= 1.01 * 1e-2 * diffused.abs().max()


def test_addition_is_learned() -> None:
    """What a far keypoint tells is learned, behind a map that cannot know it."""
    generator = torch.Generator().manual_seed(0)
    keypoints = Keypoints(
        torch.tensor([[4.0, 4.0], [60.0, 40.0]]).expand(64, -1, -1), torch.ones(64, 2).bool(), (48, 64)
    )
    classes = torch.randint(2, (64,), generator=generator)
    features = 0.1 * torch.randn(64, 4, 24, 32, generator=generator)
    features[:, 0, 20, 30] += 2.0 * classes - 1
    torch.manual_seed(0)
    layer, head = KAFLayer(4, fusion="add", **SMALL), nn.Conv2d(4, 2, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(150):
        loss = F.cross_entropy(head(layer(features, keypoints).features)[:, :, 2, 2], classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alone = F.cross_entropy(head(features)[:, :, 2, 2], classes)
    assert loss < 0.1
    assert alone > 0.5


@pytest.mark.parametrize("nested", [False, True])
def test_a_missing_gain_is_named(nested: bool) -> None:
    """As in a state dict without metadata (a plain dict, safetensors): nothing is filled in silently."""
    add, concat = KAFLayer(4, fusion="add", **SMALL), KAFLayer(4, **SMALL)
    state = dict(concat.state_dict())
    module, prefix = (nn.Sequential(add), "0.") if nested else (add, "")
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{prefix}gain"'):
        module.load_state_dict({f"{prefix}{name}": value for name, value in state.items()})
    assert add.load_state_dict(state, strict=False).missing_keys == ["gain"]
    assert add.gain.eq(0).all()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gain"):
        concat.load_state_dict(add.state_dict())


@pytest.mark.parametrize("sampling", ["nearest", "bilinear"])
def test_nearest_sampling_knows_no_more_than_the_cells(sampling: str) -> None:
    layer = KAFLayer(4, sampling=sampling, **SMALL).eval()
    cells = KEYPOINTS.cells((6, 10))
    first_pixel = 2.0 * torch.stack([cells % 10, cells // 10], dim=-1)
    here, there = (Keypoints(first_pixel + step, KEYPOINTS.valid, (12, 20)) for step in (0.0, 0.9))
    tokens = [layer(map_of(4), keypoints).tokens for keypoints in (here, there)]
    assert tokens[0].equal(tokens[1]) == (sampling == "nearest")


def test_attention_is_long_range() -> None:
    """A change under one keypoint reaches the map around another, far from it."""
    layer = KAFLayer(4, **SMALL).eval()
    keypoints = Keypoints(torch.tensor([[[2.0, 2.0], [60.0, 40.0]]]), torch.ones(1, 2, dtype=torch.bool), (48, 64))
    features = torch.randn(1, 4, 48, 64)
    changed = features.clone()
    changed[:, :, 2, 2] += 1
    difference = (layer(changed, keypoints).features - layer(features, keypoints).features)[:, 4:].abs().sum((0, 1))
    assert difference[40, 60] > 0
    assert difference[20:30].eq(0).all()


@pytest.mark.parametrize("edge", [6, 60])
def test_no_slots_at_all(edge: int) -> None:
    """In single precision, whose matrix products take another way."""
    layer = KAFLayer(4, **SMALL)
    keypoints = random_keypoints((edge, 2 * edge), (0, 0), slots=0, dtype=torch.float32)
    features = torch.randn(2, 4, edge, 2 * edge, requires_grad=True)
    layer(features, keypoints).features.sum().backward()
    assert features.grad.isfinite().all()
    with pytest.raises(ValueError, match="more than one pixel"):
        layer(torch.randn(1, 4, 1, 1), random_keypoints((16, 16), (0,), slots=0, dtype=torch.float32))


@pytest.mark.parametrize(("options", "channels"), [({}, 8), ({"out_channels": 3}, 7), ({"fusion": "add"}, 4)])
def test_fused_channels(options: dict[str, object], channels: int) -> None:
    layer = KAFLayer(4, **SMALL, **options)
    features, tokens = layer(map_of(4), KEYPOINTS)
    assert features.shape == (3, channels, 6, 10)
    assert layer.fused_channels == channels
    assert tokens.shape == (3, KEYPOINTS.valid.shape[1], 16)


@pytest.mark.parametrize("training", [False, True])
def test_channels_last(training: bool) -> None:
    layer = KAFLayer(4, **SMALL).train(training)
    features = map_of(4)
    fused = layer(features.to(memory_format=torch.channels_last), KEYPOINTS).features
    assert fused.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused, layer(features, KEYPOINTS).features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_autocast(block: str, dtype: torch.dtype) -> None:
    layer = KAFLayer(4, block=block, **SMALL)
    features = map_of(4).requires_grad_()
    expected = layer(features, KEYPOINTS)
    with torch.autocast("cpu", dtype):
        actual = layer(features, KEYPOINTS)
    actual.features.float().sum().backward()
    assert features.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert (actual.features.float() - expected.features).norm() < 0.05 * expected.features.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_caller(dtype: torch.dtype) -> None:
    output = KAFLayer(4, **SMALL).to(dtype)(map_of(4, dtype), KEYPOINTS)
    assert output.features.dtype == output.tokens.dtype == dtype


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"block": "propagation", "recompute": True}], ids=["default", "recompute"])
def test_compiles_whole(options: dict[str, object], training: bool) -> None:
    torch.compiler.reset()
    layer, other = KAFLayer(4, **SMALL, **options).train(training), KAFLayer(4, **SMALL, **options).train(training)
    other.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for counts in [(7, 0, 4), (5, 5), (2, 8, 3, 1)]:
        keypoints = random_keypoints((12, 20), counts, dtype=torch.float32)
        features = torch.randn(len(counts), 4, 6, 10)
        actual, expected = compiled(features, keypoints), other(features, keypoints)
        torch.testing.assert_close(actual.features, expected.features)
        (actual.features.sum() + actual.tokens.sum()).backward()
        (expected.features.sum() + expected.tokens.sum()).backward()
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["rows", "hybrid", "dense"])
@pytest.mark.parametrize("options", [{}, {"fusion": "add", "block": "propagation"}], ids=["concat", "add"])
def test_what_follows_may_work_in_place(options: dict[str, object], method: str, compiled: bool) -> None:
    torch.compiler.reset()
    layer = KAFLayer(4, **SMALL, **options)
    layer.diffusion.method = method
    if layer.fusion == "add":
        nn.init.normal_(layer.gain)

    def step(features: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
        fused, tokens = layer(features, KEYPOINTS)
        return F.relu(fused, inplace=in_place), F.relu(tokens, inplace=in_place)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    features, gradients = map_of(4).requires_grad_(), []
    for results in (run(features, in_place=True), step(features, in_place=False)):
        loss = sum(result.square().sum() for result in results)
        gradients.append(torch.autograd.grad(loss, [features, *layer.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_exports_with_dynamic_shapes(block: str) -> None:
    layer = KAFLayer(4, block=block, **SMALL).eval()
    dynamic = Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, [{0: dynamic, 1: dynamic}] * 2 + [(dynamic, dynamic), None])
    exported = torch.export.export(layer, (map_of(4), KEYPOINTS), dynamic_shapes=shapes).module()
    keypoints = random_keypoints((16, 14), (3, 9), dtype=torch.float32)
    features = torch.randn(2, 4, 8, 7)
    torch.testing.assert_close(exported(features, keypoints)[0], layer(features, keypoints)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "mul"}, "fusion='mul'"),
        ({"fusion": "add", "out_channels": 3}, "in_channels=4 and out_channels=3"),
        ({"sampling": "cubic"}, "mode='cubic'"),
        ({"block": "mamba"}, "block='mamba'"),
        ({"reduce": "prod"}, "reduce='prod'"),
        ({"spatial_dims": 4}, "spatial_dims=4"),
        ({"num_heads": 3}, "embed_dim=16 and num_heads=3"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KAFLayer(4, **SMALL, **options)


def test_wrong_features() -> None:
    layer = KAFLayer(4, **SMALL)
    with pytest.raises(ValueError, match=r"in_channels=4.*features.shape=torch.Size\(\[3, 5, 6, 10\]\)"):
        layer(map_of(5), KEYPOINTS)
    with pytest.raises(ValueError, match="swapped"):
        layer(map_of(4).mT, KEYPOINTS)
    with pytest.raises(ValueError, match="batch size"):
        layer(map_of(4)[:2], KEYPOINTS)


def test_encoder_runs_stage_after_stage() -> None:
    stages = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 3, padding=1)]
    layers = [KAFLayer(4, **SMALL), None, KAFLayer(5, **SMALL)]
    encoder = KAFEncoder(stages, layers).eval()
    images = torch.rand(3, 1, 12, 20)
    features, tokens = encoder(images, KEYPOINTS)
    first, first_tokens = layers[0](F.conv2d(images, stages[0].weight, stages[0].bias, padding=1), KEYPOINTS)
    second = F.conv2d(first, stages[1].weight, stages[1].bias, stride=2, padding=1)
    torch.testing.assert_close(features[:2], [first, second])
    torch.testing.assert_close(tokens[0], first_tokens)
    assert [tuple(f.shape) for f in features] == [(3, 8, 12, 20), (3, 6, 6, 10), (3, 10, 6, 10)]
    assert len(tokens) == 2


def test_encoder_without_layers_needs_no_keypoints() -> None:
    features, tokens = KAFEncoder([nn.Identity()], [None])(torch.rand(1, 1, 4, 6))
    assert features[0].shape == (1, 1, 4, 6)
    assert tokens == []


def test_encoder_errors() -> None:
    with pytest.raises(ValueError, match="got 1 stages and 2 layers"):
        KAFEncoder([nn.Identity()], [None, None])
    with pytest.raises(ValueError, match="keypoints=None"):
        KAFEncoder([nn.Identity()], [KAFLayer(4, **SMALL)])(map_of(4))

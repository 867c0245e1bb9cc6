"""The laws that every module on keypoints obeys, each checked on each module in float64 (``--dtype``) on ``--device``.

Padded slots hold NaN, some samples have no keypoints, keypoints share cells and lie on borders, and H != W.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from common import TARGET, fill_padding, holds, random_keypoints
from torch import Tensor, nn
from torch.func import functional_call

from kaf_layer import KAFLayer, KeypointDiffusion, Keypoints, KeypointSampler, KeypointScatter, KeypointTransformer

IMAGE_2D, MAP_2D = (12, 20), (6, 10)
IMAGE_3D, MAP_3D = (4, 6, 8), (2, 6, 4)
CHANNELS = 4
SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2, "hidden_channels": 3}


class Case(NamedTuple):
    """A module, whether it takes a map or tokens, and how it is called."""

    build: Callable[[], nn.Module]
    takes: str
    three_d: bool = False

    def new(self) -> nn.Module:
        return self.build().to(TARGET.device, TARGET.dtype)

    def run(
        self, module: nn.Module, values: Tensor, keypoints: Keypoints, parameters: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        size = () if isinstance(module, KeypointSampler | KeypointTransformer | KAFLayer) else (self.map_size,)
        output = functional_call(module, parameters or {}, (values, keypoints, *size))
        if isinstance(output, tuple):
            return {"map": output.features, "tokens": output.tokens}
        return {"map" if size else "tokens": output}

    @property
    def map_size(self) -> tuple[int, ...]:
        return MAP_3D if self.three_d else MAP_2D

    def keypoints(self, counts: tuple[int, ...] = (7, 0, 4), **options: object) -> Keypoints:
        size = IMAGE_3D if self.three_d else IMAGE_2D
        return random_keypoints(size, counts, dtype=TARGET.dtype, **options).to(TARGET.device)

    def values(self, keypoints: Keypoints) -> Tensor:
        shape = (
            (*keypoints.valid.shape, CHANNELS) if self.takes == "tokens" else (len(keypoints), CHANNELS, *self.map_size)
        )
        values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return values.to(TARGET.device, TARGET.dtype)


def live_layer(**options: object) -> KAFLayer:
    """A KAFLayer whose last convolution is large and whose gain is not zero, so that the laws say something."""
    layer = KAFLayer(CHANNELS, **SMALL, **options)
    nn.init.normal_(layer.diffusion.conv2.weight)
    if layer.fusion == "add":
        nn.init.normal_(layer.gain)
    return layer


CASES = {
    "sampler-bilinear": Case(lambda: KeypointSampler("bilinear"), "map"),
    "sampler-nearest": Case(lambda: KeypointSampler("nearest"), "map"),
    "sampler-3d": Case(lambda: KeypointSampler("bilinear"), "map", three_d=True),
    "scatter-mean": Case(lambda: KeypointScatter("mean"), "tokens"),
    "scatter-sum-3d": Case(lambda: KeypointScatter("sum"), "tokens", three_d=True),
    "scatter-amax": Case(lambda: KeypointScatter("amax"), "tokens"),
    "transformer": Case(lambda: KeypointTransformer(CHANNELS, depth=2, num_heads=2), "tokens"),
    "transformer-recompute": Case(
        lambda: KeypointTransformer(CHANNELS, depth=2, num_heads=2, recompute=True), "tokens"
    ),
    "transformer-both": Case(lambda: KeypointTransformer(CHANNELS, depth=2, num_heads=2, position="both"), "tokens"),
    "transformer-rotary-3d": Case(
        lambda: KeypointTransformer(CHANNELS, depth=2, num_heads=2, position="rotary", spatial_dims=3, recompute=True),
        "tokens",
        three_d=True,
    ),
    "propagation": Case(lambda: KeypointTransformer(CHANNELS, depth=2, num_heads=2, block="propagation"), "tokens"),
    "propagation-3d": Case(
        lambda: KeypointTransformer(
            CHANNELS, depth=1, num_heads=2, block="propagation", spatial_dims=3, recompute=True
        ),
        "tokens",
        three_d=True,
    ),
    "diffusion": Case(lambda: KeypointDiffusion(CHANNELS, 3, hidden_channels=5), "tokens"),
    "diffusion-3d": Case(
        lambda: KeypointDiffusion(CHANNELS, 3, hidden_channels=5, spatial_dims=3), "tokens", three_d=True
    ),
    "layer": Case(lambda: live_layer(), "map"),
    "layer-add": Case(lambda: live_layer(fusion="add", sampling="nearest", reduce="amax"), "map"),
    "layer-propagation": Case(lambda: live_layer(block="propagation", sampling="nearest", reduce="sum"), "map"),
    "layer-3d": Case(lambda: live_layer(spatial_dims=3), "map", three_d=True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def module(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.new().eval()


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert (value.shape, value.dtype, value.device) == (
            expected[name].shape,
            expected[name].dtype,
            expected[name].device,
        )
        if value.device.type != "meta":
            atol = TARGET.tolerance if tolerance is None else tolerance
            torch.testing.assert_close(
                value, expected[name], atol=atol, rtol=0 if TARGET.dtype == torch.float64 else 1e-3
            )


def with_padding(case: Case, values: Tensor, keypoints: Keypoints, garbage: float) -> tuple[Tensor, Keypoints]:
    """The same problem with other garbage in the padded slots, and two more of them in front."""

    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.cat([torch.full_like(tensor[:, :2], value), tensor], dim=1)

    positions = pad(keypoints.positions.masked_fill(~keypoints.valid[..., None], garbage), garbage)
    padded = Keypoints(positions, pad(keypoints.valid, False), keypoints.image_size)
    if case.takes == "tokens":
        values = pad(fill_padding(values, keypoints, garbage), garbage)
    return values, padded


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_padding_influences_nothing(case: Case, module: nn.Module, garbage: float, training: bool) -> None:
    keypoints = case.keypoints()
    values = case.values(keypoints)
    results = []
    for x, kp in [(values, keypoints), with_padding(case, values, keypoints, garbage)]:
        copy = case.new().train(training)
        copy.load_state_dict(module.state_dict())
        x = x.clone().requires_grad_()
        output = case.run(copy, x, kp)
        sum(value.sin().sum() for value in output.values()).backward()
        result = output | {"buffer " + k: b for k, b in copy.named_buffers()}
        result |= {"gradient " + k: p.grad for k, p in copy.named_parameters() if p.grad is not None}
        result["gradient"] = x.grad
        results.append(result)
    extra = results[1]
    for name in ("tokens", "gradient"):
        if name in extra and extra[name].ndim == 3 and extra[name].shape[1] == keypoints.valid.shape[1] + 2:
            assert holds(extra[name][:, :2].eq(0))
            extra[name] = extra[name][:, 2:]
    assert_equal(extra, results[0])
    assert all(holds(value.isfinite()) for value in extra.values())


def test_order_of_the_keypoints_is_no_matter(case: Case, module: nn.Module) -> None:
    keypoints = case.keypoints()
    values = case.values(keypoints)
    order = torch.randperm(keypoints.valid.shape[1], generator=torch.Generator().manual_seed(2)).to(TARGET.device)
    permuted = Keypoints(keypoints.positions[:, order], keypoints.valid[:, order], keypoints.image_size)
    expected = case.run(module, values, keypoints)
    actual = case.run(module, values[:, order] if case.takes == "tokens" else values, permuted)
    if "tokens" in expected:
        expected["tokens"] = expected["tokens"][:, order]
    assert_equal(actual, expected)


def test_a_sample_alone_gives_what_it_gives_in_a_batch(case: Case, module: nn.Module) -> None:
    keypoints = case.keypoints()
    values = case.values(keypoints)
    batched = case.run(module, values, keypoints)
    for i in range(len(keypoints)):
        alone = case.run(module, values[i : i + 1], keypoints[i : i + 1])
        assert_equal(alone, {name: value[i : i + 1] for name, value in batched.items()})


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_without_keypoints_is_finite(case: Case, module: nn.Module, training: bool) -> None:
    module.train(training)
    for counts, slots in [((0, 0), 3), ((0, 0), 0)]:
        keypoints = case.keypoints(counts, slots=slots)
        values = case.values(keypoints).requires_grad_()
        output = case.run(module, values, keypoints)
        sum(value.sum() for value in output.values()).backward()
        assert all(holds(value.isfinite()) for value in output.values())
        assert values.grad is not None
        assert holds(values.grad.isfinite())
        assert all(holds(p.grad.isfinite()) for p in module.parameters() if p.grad is not None)
        assert all(holds(buffer.isfinite()) for buffer in module.buffers())


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch(case: Case, module: nn.Module, training: bool) -> None:
    """Gives an empty result of the right shape, gradients of zero, and leaves running statistics as they are."""
    keypoints, statistics = case.keypoints(), {name: b.clone() for name, b in module.named_buffers()}
    values = case.values(keypoints)
    shapes = {name: value[:0].shape for name, value in case.run(module, values, keypoints).items()}
    none = values[:0].clone().requires_grad_()
    output = case.run(module.train(training), none, keypoints[:0])
    assert {name: value.shape for name, value in output.items()} == shapes
    sum(value.sum() for value in output.values()).backward()
    assert none.grad is not None
    assert all(p.grad is None or holds(p.grad == 0) for p in module.parameters())
    for name, buffer in module.named_buffers():
        assert "num_batches" in name or holds(buffer == statistics[name])


@pytest.mark.parametrize("method", ["rows", "hybrid", "dense"])
def test_an_empty_batch_in_every_way_to_compute(method: str) -> None:
    case = CASES["diffusion"]
    module, keypoints = case.new(), case.keypoints()[:0]
    module.method = method
    features = torch.ones(0, 2, *MAP_2D, dtype=TARGET.dtype, device=TARGET.device)
    assert module(case.values(keypoints), keypoints, MAP_2D, features=features).shape == (0, 5, *MAP_2D)
    assert holds(module.norm.running_mean.eq(0))
    assert holds(module.norm.running_var.eq(1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("far", [1e30, float("inf"), 25.0])
def test_positions_outside_count_as_on_the_border(case: Case, module: nn.Module, far: float, training: bool) -> None:
    keypoints = case.keypoints()
    edge = [size - 0.5 for size in keypoints.image_size[::-1]]
    inside = keypoints.positions.clone()
    inside[:, ::2, 0], inside[:, 1::2, 1] = edge[0], -0.5
    outside = inside.clone()
    outside[:, ::2, 0], outside[:, 1::2, 1] = far, -far
    module.train(training)
    values = case.values(keypoints)
    results = []
    for positions in (inside, outside):
        copy = case.new().train(training)
        copy.load_state_dict(module.state_dict())
        x = values.clone().requires_grad_()
        output = case.run(copy, x, Keypoints(positions, keypoints.valid, keypoints.image_size))
        sum(value.sin().sum() for value in output.values()).backward()
        results.append(output | {"gradient": x.grad})
    assert_equal(results[1], results[0])


def test_a_coordinate_that_is_nan_counts_as_zero(case: Case, module: nn.Module) -> None:
    keypoints = case.keypoints()
    values, positions = case.values(keypoints), keypoints.positions.clone()
    positions[:, ::2, 1] = float("nan")
    expected = Keypoints(positions.nan_to_num(nan=0.0), keypoints.valid, keypoints.image_size)
    actual = Keypoints(positions, keypoints.valid, keypoints.image_size)
    assert_equal(case.run(module, values, actual), case.run(module, values, expected))


@pytest.mark.parametrize("training", [False, True])
def test_gradients(case: Case, module: nn.Module, training: bool) -> None:
    if TARGET.dtype != torch.float64 or TARGET.device == "meta":
        pytest.skip("finite differences need values in double precision")
    keypoints = case.keypoints((3, 0), slots=4)
    module.train(training)
    names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def run(values: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(names, parameters, strict=True))
        return tuple(case.run(module, values, keypoints, replaced).values())

    values = case.values(keypoints).requires_grad_()
    assert torch.autograd.gradcheck(run, (values, *parameters), fast_mode=True)


def test_state_dict_round_trip(case: Case, module: nn.Module) -> None:
    other = case.new().eval()
    other.load_state_dict(module.state_dict())
    keypoints = case.keypoints()
    values = case.values(keypoints)
    assert_equal(case.run(other, values, keypoints), case.run(module, values, keypoints), tolerance=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case: Case, module: nn.Module, dtype: torch.dtype, training: bool) -> None:
    """Weights, maps and tokens in half precision give what they give in double precision, nearly."""
    keypoints = case.keypoints()
    values = fill_padding(v, keypoints, 0.0) if (v := case.values(keypoints)).ndim == 3 else v
    values, module = values.to(dtype), module.to(dtype).train(training)
    exact = case.new().train(training)
    exact.load_state_dict(module.state_dict())
    expected = case.run(exact, values.to(TARGET.dtype), keypoints)
    half = values.clone().requires_grad_()
    actual = case.run(module, half, keypoints)
    sum(value.float().mean() for value in actual.values()).backward()
    for name, value in actual.items():
        assert value.dtype == dtype
        error = (value.to(TARGET.dtype) - expected[name]).norm() / expected[name].norm()
        assert holds(error < (0.1 if dtype == torch.bfloat16 else 0.02)), (name, error)
    assert half.grad is not None
    assert holds(half.grad.isfinite())
    assert all(holds(p.grad.isfinite()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["rows", "hybrid", "dense"])
@pytest.mark.parametrize("three_d", [False, True])
def test_half_precision_in_every_way_to_compute(method: str, three_d: bool, training: bool) -> None:
    case = CASES["diffusion-3d" if three_d else "diffusion"]
    keypoints = case.keypoints()
    tokens = fill_padding(case.values(keypoints), keypoints, 0.0).bfloat16()
    half = case.new().bfloat16().train(training)
    exact = case.new().train(training)
    exact.load_state_dict(half.state_dict())
    half.method, exact.method = method, "dense"
    expected = exact(tokens.to(TARGET.dtype), keypoints, case.map_size)
    actual = half(tokens, keypoints, case.map_size)
    assert actual.dtype == torch.bfloat16
    assert holds((actual.to(TARGET.dtype) - expected).norm() < 0.05 * expected.norm())

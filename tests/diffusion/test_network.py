import copy

import pytest
import torch
from common import fill_padding, random_keypoints
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from benchmarks.common.measuring import count_flops, saved_bytes
from kaf_layer import Keypoints
from kaf_layer.diffusion import KeypointDiffusion, cheapest_method
from kaf_layer.scattering import scatter_keypoints

METHODS = ["rows", "hybrid", "dense"]
SIZES = [(5, 7), (12, 20), (1, 6), (3, 3), (2, 1), (2, 3, 4), (1, 5, 3)]


def make(
    size: tuple[int, ...],
    *,
    training: bool = True,
    reduce: str = "mean",
    dtype=torch.float64,
    gain=False,
    **channels: int,
):
    """A diffusion network with nothing at its initial value, and on request a gain to call it with."""
    channels = {"in_channels": 6, "out_channels": 3, "hidden_channels": 5} | channels
    module = KeypointDiffusion(**channels, reduce=reduce, spatial_dims=len(size)).to(dtype).train(training)
    for values in (module.norm.weight, module.norm.bias, module.norm.running_mean):
        nn.init.normal_(values)
    nn.init.uniform_(module.norm.running_var, 0.5, 2.0)
    module.gain = nn.Parameter(torch.randn(channels["out_channels"], dtype=dtype)) if gain else None
    return module


def plain(module: KeypointDiffusion, tokens: Tensor, keypoints: Keypoints, size, features: Tensor | None) -> Tensor:
    """The paper's network, on the scattered tokens."""
    network = nn.Sequential(module.conv1, module.norm, nn.ReLU(), module.conv2)
    result = network(scatter_keypoints(tokens, keypoints, size, reduce=module.reduce))
    if module.gain is not None:
        return features + module.gain.view(-1, *[1] * len(size)) * result
    return result if features is None else torch.cat([features, result], dim=1)


def outcome(module, run, tokens: Tensor, features: Tensor | None) -> dict[str, Tensor]:
    """Result, gradients and running statistics of ``run(module, tokens, features)``, with a copy of the module."""
    module = copy.deepcopy(module)
    inputs = {"tokens": tokens.clone().requires_grad_()}
    if features is not None:
        inputs["features"] = features.clone().requires_grad_()
    result = run(module, inputs["tokens"], inputs.get("features"))
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    leaves = inputs | dict(module.named_parameters())
    gradients = torch.autograd.grad((result * weight).sum(), list(leaves.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"result": result.detach(), **named, **dict(module.named_buffers())}


def oracle(module, keypoints, size, tokens: Tensor, features: Tensor | None) -> dict[str, Tensor]:
    """The plain network's outcome, in double precision."""
    features = None if features is None else features.double()
    return outcome(
        copy.deepcopy(module).double(), lambda m, t, f: plain(m, t, keypoints, size, f), tokens.double(), features
    )


def compare(module, keypoints, size, method, *, features: Tensor | None = None, tolerance: float = 1e-10) -> None:
    """Asserts that a method agrees with the plain network to ``tolerance``, relative to the largest value."""
    tokens = torch.randn(*keypoints.valid.shape, module.conv1.in_channels, dtype=module.conv1.weight.dtype)
    module.method = method
    actual = outcome(
        module,
        lambda m, t, f: m(t, keypoints, size, features=f, gain=m.gain),
        fill_padding(tokens, keypoints),
        features,
    )
    for name, expected in oracle(module, keypoints, size, tokens, features).items():
        scale = expected.abs().max().clamp(min=1.0).item() if expected.numel() else 1.0
        torch.testing.assert_close(
            actual[name].to(expected.dtype),
            expected,
            rtol=0.0,
            atol=tolerance * scale,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_papers_network(size, training, method):
    keypoints = random_keypoints(tuple(2 * s for s in size), (9, 0, 4))
    compare(make(size, training=training), keypoints, size, method, features=torch.randn(3, 2, *size).double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_with_a_gain_it_is_added(size, training, method):
    keypoints = random_keypoints(tuple(2 * s for s in size), (9, 0, 4))
    module = make(size, training=training, gain=True)
    compare(module, keypoints, size, method, features=torch.randn(3, 3, *size).double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduce", ["mean", "sum", "amax"])
@pytest.mark.parametrize("training", [True, False])
def test_crowds_in_one_cell(training, reduce, method):
    keypoints = random_keypoints((12, 18), (60, 0, 25))
    compare(make((4, 6), training=training, reduce=reduce), keypoints, (4, 6), method)


@pytest.mark.parametrize("method", ["rows", "hybrid"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 1)])
def test_batches_with_hardly_a_keypoint(counts, method):
    compare(make((5, 7)), random_keypoints((10, 14), counts), (5, 7), method)


@pytest.mark.parametrize("method", ["rows", "hybrid"])
def test_no_slots(method):
    keypoints = Keypoints(torch.zeros(2, 0, 2), torch.zeros(2, 0).bool(), (4, 6))
    compare(make((4, 6)), keypoints, (4, 6), method)


@pytest.mark.parametrize("method", ["rows", "hybrid"])
@pytest.mark.parametrize("training", [True, False])
def test_single_precision(training, method):
    size = (32, 48)
    keypoints = random_keypoints((64, 96), (40, 25), dtype=torch.float32)
    module = make(size, training=training, dtype=torch.float32, in_channels=32, hidden_channels=16, out_channels=8)
    compare(module, keypoints, size, method, tolerance=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_map_with_any_keypoints(data):
    size = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3)))
    stride = data.draw(st.integers(1, 3))
    counts = tuple(data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=3)))
    training = data.draw(st.booleans()) and len(counts) * torch.Size(size).numel() > 1
    seed = data.draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    keypoints = random_keypoints(tuple(stride * s for s in size), counts, seed=seed)
    module = make(size, training=training, reduce=data.draw(st.sampled_from(["mean", "sum", "amax"])))
    fused = data.draw(st.integers(0, 2))
    features = torch.randn(len(counts), fused, *size, dtype=torch.float64) if fused else None
    compare(module, keypoints, size, data.draw(st.sampled_from(["rows", "hybrid"])), features=features, tolerance=1e-9)


@pytest.mark.parametrize("method", ["rows", "hybrid"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training, method):
    size = (4, 5)
    keypoints = random_keypoints((8, 10), (6, 2))
    module = make(size, training=training, in_channels=2, hidden_channels=3, out_channels=2)
    module.method = method
    names, parameters = zip(*module.named_parameters(), strict=True)
    tokens = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)

    def run(tokens: Tensor, features: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in module.named_buffers()}
        return torch.func.functional_call(module, state, (tokens, keypoints, size), {"features": features})

    assert torch.autograd.gradcheck(run, (tokens, features, *parameters))


@pytest.mark.parametrize("method", METHODS)
def test_garbage_reaches_no_gradient(method):
    keypoints = random_keypoints((10, 14), (5, 0))
    module = make((5, 7))
    module.method = method
    tokens = fill_padding(torch.randn(2, 7, 6, dtype=torch.float64), keypoints).requires_grad_()
    module(tokens, keypoints, (5, 7)).square().sum().backward()
    assert tokens.grad.masked_select(~keypoints.valid[..., None]).eq(0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("method", "training"), [("rows", True), ("rows", False), ("hybrid", True), ("dense", True)])
@pytest.mark.parametrize("add", [True, False])
def test_it_compiles(add, method, training):
    torch.compiler.reset()
    size, keypoints = (6, 9), random_keypoints((12, 18), (9, 0, 4), dtype=torch.float32)
    module = make(size, training=training, dtype=torch.float32, gain=add)
    module.method = method
    tokens, features = fill_padding(torch.randn(3, 11, 6), keypoints), torch.randn(3, 3, *size)

    def run(module, tokens, features):
        return module(tokens, keypoints, size, features=features, gain=module.gain)

    expected = outcome(module, run, tokens, features)
    actual = outcome(module, torch.compile(run, fullgraph=True, backend="aot_eager"), tokens, features)
    torch.testing.assert_close(actual, expected)


class Fused(nn.Module):
    def __init__(self, diffusion: KeypointDiffusion) -> None:
        super().__init__()
        self.diffusion = diffusion

    def forward(self, features: Tensor, positions: Tensor, valid: Tensor, tokens: Tensor) -> Tensor:
        size = features.shape[2:]
        keypoints = Keypoints(positions, valid, (2 * size[0], 2 * size[1]))
        return self.diffusion(tokens, keypoints, size, features=features)


@pytest.mark.parametrize("training", [True, False])
def test_it_exports_with_dynamic_shapes(training):
    module = Fused(make((8, 10), training=training, dtype=torch.float32))

    def inputs(batch: int, slots: int, height: int, width: int) -> tuple[Tensor, ...]:
        keypoints = random_keypoints((2 * height, 2 * width), tuple(range(batch)), slots=slots, dtype=torch.float32)
        tokens = fill_padding(torch.randn(batch, slots, 6), keypoints)
        return torch.randn(batch, 2, height, width), keypoints.positions, keypoints.valid, tokens

    batch, slots, height, width = Dim("B"), Dim("N"), Dim("H", min=2), Dim("W", min=2)
    slotted = {0: batch, 1: slots}
    exported = torch.export.export(
        copy.deepcopy(module),
        inputs(3, 8, 8, 10),
        dynamic_shapes=({0: batch, 2: height, 3: width}, slotted, slotted, slotted),
    ).module()
    for shape in ((3, 8, 8, 10), (2, 5, 12, 7), (1, 40, 4, 3)):
        arguments = inputs(*shape)
        torch.testing.assert_close(exported(*arguments), module(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["rows", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", ["concat", "add", None])
def test_autocast(dtype, method, fused):
    size, keypoints = (12, 20), random_keypoints((24, 40), (9, 0, 4), dtype=torch.float32)
    module = make(size, dtype=torch.float32, gain=fused == "add")
    module.method = method
    tokens, features = torch.randn(3, 11, 6), torch.randn(3, 3, *size) if fused else None

    def low(module, tokens, features):
        with torch.autocast("cpu", dtype):
            return module(tokens, keypoints, size, features=features, gain=module.gain)

    def plain_low(module, tokens, features):
        with torch.autocast("cpu", dtype):
            return plain(module, tokens, keypoints, size, features)

    actual = outcome(module, low, fill_padding(tokens, keypoints), features)
    expected = oracle(module, keypoints, size, tokens, features)
    dtypes = {name: value.dtype for name, value in outcome(module, plain_low, tokens, features).items()}
    assert {name: value.dtype for name, value in actual.items()} == dtypes
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / (value.double().norm() + 1e-3)
        assert error < 8 * torch.finfo(dtype).eps, f"{name}: {error}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("add", [True, False])
def test_the_memory_format_is_kept(add, method):
    size, keypoints = (12, 20), random_keypoints((24, 40), (9, 4), dtype=torch.float32)
    module = make(size, dtype=torch.float32, gain=add)
    module.method = method
    tokens, features = fill_padding(torch.randn(2, 11, 6), keypoints), torch.randn(2, 3, *size)
    contiguous = module(tokens, keypoints, size, features=features, gain=module.gain)
    assert contiguous.is_contiguous()
    assert module(tokens, keypoints, size).is_contiguous()
    features = features.to(memory_format=torch.channels_last)
    channels_last = module(tokens, keypoints, size, features=features, gain=module.gain)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-4, atol=1e-4)


def test_what_is_kept_and_multiplied_does_not_grow_with_the_map():
    """Except for one number (of 8 bytes) for each pixel along the borders, and one more for each sample."""
    module = make((64, 64), gain=True)
    keypoints = random_keypoints((64, 64), (6, 3))
    tokens = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    sizes = (64, 64), (128, 96)
    borders = [2 * sum(size) for size in sizes]
    maps = [torch.zeros(2, 3, *size, dtype=torch.float64) for size in sizes]
    for gain in (module.gain, None):
        fused = [
            saved_bytes(lambda x=x, gain=gain: module(tokens, keypoints, x.shape[2:], features=x, gain=gain))
            for x in maps
        ]
        assert fused[1] - fused[0] == (1 + 2) * 8 * (borders[1] - borders[0])
    runs = [lambda size=size: module(tokens, keypoints, size) for size in sizes]
    assert cheapest_method(8, (64, 64)) == "rows"
    assert saved_bytes(runs[1]) - saved_bytes(runs[0]) == (1 + 2) * 8 * (borders[1] - borders[0])
    slots, first, second = 2 * 8, 6 * 9 * 5, 5 * 3
    constant = 9 * 9 * second  # a map of three pixels along each axis
    assert count_flops(runs[0]) == count_flops(runs[1]) == 2 * (first * slots + 81 * second * slots + constant)


@pytest.mark.parametrize("method", ["rows", "hybrid"])
def test_it_is_deterministic(method):
    size, keypoints = (12, 20), random_keypoints((24, 40), (40, 13), dtype=torch.float32)
    module = make(size, dtype=torch.float32)
    module.method = method
    tokens = torch.randn(2, 42, 6)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (outcome(module, lambda m, t, _: m(t, keypoints, size), tokens, None) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("option", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_other_normalisation_is_computed_densely(option):
    keypoints = random_keypoints((20, 24), (5, 2))
    module = make((20, 24))
    module.norm = nn.BatchNorm2d(5, **option).double()
    compare(module, keypoints, (20, 24), "rows")


def test_the_rule():
    assert [cheapest_method(512, (edge, edge)) for edge in (512, 256, 128, 64, 16)] == [
        "rows", "rows", "rows", "hybrid", "dense",
    ]  # fmt: skip
    assert [cheapest_method(2048, (edge, edge)) for edge in (256, 128, 64)] == ["rows", "hybrid", "hybrid"]
    assert cheapest_method(512, (64, 64, 64)) == "rows"


def test_the_rule_by_device_and_type():
    """In half precision on an accelerator convolutions are cheaper; on a CPU, and in single precision, they are not."""
    half = {"device": "cuda", "dtype": torch.bfloat16}
    assert [cheapest_method(512, (edge, edge), **half) for edge in (512, 256, 128, 64, 32)] == [
        "rows", "rows", "hybrid", "dense", "dense",
    ]  # fmt: skip
    assert [cheapest_method(slots, (32, 32, 32), **half) for slots in (128, 512, 4096)] == ["rows", "hybrid", "dense"]
    for others in ({"device": "cuda"}, {"dtype": torch.bfloat16}):
        assert all(
            cheapest_method(512, (edge, edge), **others) == cheapest_method(512, (edge, edge)) for edge in (128, 64)
        )


def test_the_rule_takes_the_type_of_autocast(monkeypatch):
    seen = []

    def rule(slots, size, **options):
        seen.append((slots, *size, *options.values()))
        return "rows"

    monkeypatch.setattr("kaf_layer.diffusion.network.cheapest_method", rule)
    keypoints, module = random_keypoints((20, 24), (5, 2), dtype=torch.float32), make((10, 12), dtype=torch.float32)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            module(torch.randn(2, 7, 6), keypoints, (10, 12))
    cpu = torch.device("cpu")
    assert seen == [(7, 10, 12, cpu, torch.float32), (7, 10, 12, cpu, torch.bfloat16)]


def test_its_state_dict_names_the_layers():
    names = {name.split(".")[0] for name in KeypointDiffusion(8, 4).state_dict()}
    assert names == {"conv1", "norm", "conv2"}


def test_what_does_not_fit_is_refused():
    keypoints = random_keypoints((8, 6), (5, 3), dtype=torch.float32)
    module, tokens = KeypointDiffusion(3, 4), torch.zeros(2, 7, 3)
    with pytest.raises(ValueError, match="one for each slot"):
        module(tokens[:, :4], keypoints, (4, 3))
    with pytest.raises(ValueError, match=r"features must be.*features\.shape"):
        module(tokens, keypoints, (4, 3), features=torch.zeros(2, 5, 3, 4))
    for features, gain in ((None, 4), (torch.zeros(2, 4, 4, 3), 3), (torch.zeros(2, 3, 4, 3), 4)):
        with pytest.raises(ValueError, match="with a gain, features must have 4 channels, and gain as many numbers"):
            module(tokens, keypoints, (4, 3), features=features, gain=torch.zeros(gain))
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        KeypointDiffusion(3, 4, spatial_dims=1)
    with pytest.raises(ValueError, match="reduce must be one of"):
        KeypointDiffusion(3, 4, reduce="max")

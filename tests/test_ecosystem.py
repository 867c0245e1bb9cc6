"""What the ecosystem does to modules, done to those of a layer: the result is the dense network's, or an error by name.

Each case runs where the diffusion is sparse ("rows", "hybrid") and where it is dense. The oracle is the same network
with every module called on the whole map. What needs packages of its own is in tests/frameworks/test_adapters.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from common import fill_padding, leave_group, random_keypoints
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, update_bn

from kaf_layer import KAFLayer, KeypointDiffusion, Keypoints, KeypointTransformer
from kaf_layer.normalization import MaskedBatchNorm
from kaf_layer.positions import authors_positions
from kaf_layer.scattering import scatter_keypoints

METHODS = ["rows", "hybrid", "dense"]
SIZE = (8, 11)
KEYPOINTS = random_keypoints((16, 22), (9, 0, 4))


def diffusion(**options: int) -> KeypointDiffusion:
    torch.manual_seed(0)
    module = KeypointDiffusion(6, 3, hidden_channels=5, **options).double()
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    return module


def dense(module: KeypointDiffusion, tokens: Tensor) -> Tensor:
    sparse = scatter_keypoints(tokens, KEYPOINTS, SIZE, reduce=module.reduce)
    return module.conv2(F.relu(module.norm(module.conv1(sparse))))


def outcome(module: KeypointDiffusion, run: Callable[..., Tensor]) -> dict[str, Tensor | None]:
    """Two training steps: the results, the gradients of all parameters, and the buffers."""
    tokens = fill_padding(torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(1)).double(), KEYPOINTS)
    results = {}
    for step in range(2):
        result = run(module, tokens + step)
        module.zero_grad()
        (result * torch.arange(result.numel()).view_as(result).sin()).sum().backward()
        results[f"result {step}"] = result.detach()
    results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return results | dict(module.named_buffers())


def pruned(module: KeypointDiffusion) -> None:
    prune.random_unstructured(module.conv1, "weight", amount=0.5)
    prune.l1_unstructured(module.conv2, "weight", amount=0.5)


def old_weight_norm(module: KeypointDiffusion) -> None:
    for conv in (module.conv1, module.conv2):
        with pytest.warns(FutureWarning, match="deprecated"):
            nn.utils.weight_norm(conv)
        with torch.no_grad():
            conv.weight_g.mul_(1.5)  # the weight that is there is stale now


def old_spectral_norm(module: KeypointDiffusion) -> None:
    nn.utils.spectral_norm(module.conv1)
    nn.utils.spectral_norm(module.conv2)


def weight_norm(module: KeypointDiffusion) -> None:
    for conv in (module.conv1, module.conv2):
        parametrizations.weight_norm(conv)
        with torch.no_grad():
            conv.parametrizations.weight.original0.mul_(1.5)


def spectral_norm(module: KeypointDiffusion) -> None:
    parametrizations.spectral_norm(module.conv1)
    parametrizations.spectral_norm(module.conv2)


def circular(module: KeypointDiffusion) -> None:
    module.conv1.padding_mode = module.conv2.padding_mode = "circular"
    module.conv1._reversed_padding_repeated_twice = module.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


class Standardised(nn.Conv2d):
    """Weight standardisation, as in many a network (Qiao et al., 2019)."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


def subclassed(module: KeypointDiffusion) -> None:
    module.conv1, module.conv2 = (
        Standardised(6, 5, 3, padding=1).double(),
        Standardised(5, 3, 3, padding=1).double(),
    )


def separable(module: KeypointDiffusion) -> None:
    module.conv1 = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 5, 1)).double()


def without_bias(module: KeypointDiffusion) -> None:
    module.conv1, module.conv2 = (
        nn.Conv2d(6, 5, 3, padding=1, bias=False).double(),
        nn.Conv2d(5, 3, 3, padding=1, bias=False).double(),
    )


def dilated(module: KeypointDiffusion) -> None:
    module.conv2 = nn.Conv2d(5, 3, 3, padding=2, dilation=2).double()


def group_norm(module: KeypointDiffusion) -> None:
    module.norm = nn.GroupNorm(1, 5).double()


def frozen_norm(module: KeypointDiffusion) -> None:
    module.norm.eval().requires_grad_(False)


def cumulative_norm(module: KeypointDiffusion) -> None:
    module.norm.momentum = None


def forward_of_its_own(module: KeypointDiffusion) -> None:
    forward = module.conv2.forward
    module.conv2.forward = lambda x: 2 * forward(x)


CHANGES = [
    pruned,
    old_weight_norm,
    old_spectral_norm,
    weight_norm,
    spectral_norm,
    circular,
    subclassed,
    separable,
    without_bias,
    dilated,
    group_norm,
    frozen_norm,
    cumulative_norm,
    forward_of_its_own,
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_count(change: Callable[[KeypointDiffusion], None], method: str) -> None:
    results = []
    for run in (lambda m, t: m(t, KEYPOINTS, SIZE), dense):
        module = diffusion()
        change(module)
        module.method = method
        results.append(outcome(module, run))
    actual, expected = results
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conv1", "norm", "conv2"])
def test_hooks_run_and_see_the_whole_map(name: str, method: str) -> None:
    """As Grad-CAM asks: a module's output, and its gradient."""
    module = diffusion()
    module.method = method
    calls: dict[str, Tensor] = {}
    hooked = module.get_submodule(name)
    hooked.register_forward_pre_hook(lambda _m, args: calls.update(input=args[0]))
    hooked.register_forward_hook(lambda _m, _args, output: calls.update(output=output))
    hooked.register_full_backward_hook(lambda _m, _in, grad: calls.update(gradient=grad[0]))
    module(torch.randn(3, 11, 6).double().requires_grad_(), KEYPOINTS, SIZE).square().sum().backward()
    assert calls.keys() == {"input", "output", "gradient"}
    assert calls["output"].shape == calls["gradient"].shape
    assert calls["output"].shape[2:] == SIZE
    assert calls["gradient"].abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_may_change_the_result(method: str) -> None:
    module, tokens = diffusion().eval(), torch.randn(3, 11, 6).double()
    module.method = method
    plain = module(tokens, KEYPOINTS, SIZE)
    with module.conv2.register_forward_hook(lambda _m, _args, output: 2 * output):
        torch.testing.assert_close(module(tokens, KEYPOINTS, SIZE), 2 * plain)
    assert torch.equal(module(tokens, KEYPOINTS, SIZE), plain)


SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2, "hidden_channels": 4}
LAYER_KEYPOINTS = random_keypoints((16, 22), (9, 0, 4), dtype=torch.float32)


def layer(**options: object) -> KAFLayer:
    torch.manual_seed(0)
    return KAFLayer(4, **SMALL, **options)


def features(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", ["transformer", "propagation"])
@pytest.mark.parametrize("assign", [False, True])
def test_the_meta_device(assign: bool, block: str) -> None:
    """A layer that is made on it, given memory, and loaded strictly, is complete."""
    source = layer(block=block)
    with torch.device("meta"):
        module = KAFLayer(4, **SMALL, block=block)
    if not assign:
        module = module.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    module.load_state_dict(source.state_dict(), strict=True, assign=assign)
    for training in (False, True):
        expected = source.train(training)(features(), LAYER_KEYPOINTS)
        actual = module.train(training)(features(), LAYER_KEYPOINTS)
        torch.testing.assert_close(tuple(actual), tuple(expected))
    assert not [name for name in dict(module.named_buffers()) if name not in module.state_dict()]


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_copies_are_the_same(block: str) -> None:
    module = layer(block=block)
    module(features(), LAYER_KEYPOINTS).features.sum().backward()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
        AveragedModel(module, use_buffers=True).module,
    ]
    expected = module(features(1), LAYER_KEYPOINTS)
    for other in copies:
        torch.testing.assert_close(tuple(other(features(1), LAYER_KEYPOINTS)), tuple(expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", ["transformer", "propagation"])
@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_torch_func(fusion: str, block: str, method: str) -> None:
    module = layer(block=block, fusion=fusion).double().eval()
    module.diffusion.method = method
    if fusion == "add":
        nn.init.normal_(module.gain)
    x = features().double()
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x, KEYPOINTS)).features.sin().sum()

    actual = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(actual.values()), list(expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dims", [2, 3])
def test_second_derivatives(dims: int, method: str) -> None:
    size = (3, 5) if dims == 2 else (2, 3, 4)
    keypoints = random_keypoints(size, (3, 1), slots=4)
    torch.manual_seed(0)
    module = KeypointDiffusion(2, 2, hidden_channels=3, spatial_dims=dims).double()
    module.method = method
    tokens = torch.randn(2, 4, 2).double().requires_grad_()
    weights = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def run(tokens: Tensor, *weights: Tensor) -> Tensor:
        state = dict(zip(names, weights, strict=True)) | {k: v.clone() for k, v in module.named_buffers()}
        return torch.func.functional_call(module, state, (tokens, keypoints, size))

    assert torch.autograd.gradcheck(run, (tokens, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (tokens, *weights), fast_mode=True)


def test_batch_norms_of_tokens_are_batch_norms() -> None:
    """To what freezes them, and to the average of weights, which takes their statistics anew."""
    module = layer(block="propagation")
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sum(isinstance(m, MaskedBatchNorm) for m in norms) == 6
    for norm in norms:
        norm.eval()
    before = {name: b.clone() for name, b in module.named_buffers()}
    module(features(), LAYER_KEYPOINTS)
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, LAYER_KEYPOINTS).features

    update_bn([features(seed) for seed in range(3)], Network())
    first = module.transformer.position_encoder.norms[0]
    hidden = module.transformer.position_encoder.linears[0]
    assert first.num_batches_tracked == 3
    assert first.momentum == 0.1  # as before
    expected = hidden(authors_positions(LAYER_KEYPOINTS.resize(SIZE)))[LAYER_KEYPOINTS.valid].mean(0)
    torch.testing.assert_close(first.running_mean, expected)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*quantiz")
def test_dynamic_quantization_finds_every_linear_map() -> None:
    module = layer().eval()
    linear = [name for name, m in module.named_modules() if type(m) is nn.Linear]
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    kept = [name for name, m in quantized.named_modules() if type(m) is nn.Linear]
    assert len(linear) == 14
    assert kept == []
    actual, expected = (m(features(), LAYER_KEYPOINTS).features for m in (quantized, module))
    assert (actual - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_keep_their_precision(dtype: torch.dtype) -> None:
    exact = torch.tensor([[[638.3, 477.6]]])
    keypoints = Keypoints(exact, torch.ones(1, 1).bool(), (480, 640), scores=torch.ones(1, 1))
    cast = keypoints.to(dtype)
    assert torch.equal(cast.positions, exact)
    assert cast.scores.dtype == dtype
    low = Keypoints(exact.to(dtype), keypoints.valid, (480, 640))
    for module, values in (
        (layer(), torch.rand(1, 4, 60, 80)),
        (KeypointTransformer(8, num_heads=2), torch.rand(1, 1, 8)),
    ):
        with pytest.raises(
            ValueError, match=r"keypoints must have positions that tell pixels apart.*cast_forward_inputs"
        ):
            module(values, low)


def test_meta_tensors_keep_their_metadata_and_train() -> None:
    data = pytest.importorskip("monai.data", reason="MONAI is an extra")
    for fusion in ("concat", "add"):
        module = layer(fusion=fusion)
        x = data.MetaTensor(features(), meta={"a": 1}).requires_grad_()
        for method in METHODS:
            module.diffusion.method = method
            result = module(x, LAYER_KEYPOINTS).features
            assert result.meta["a"] == 1
            (result.relu_() * 2).sum().backward()
            assert x.grad.isfinite().all()


def _split(rank: int, folder: str, run: Callable[..., object]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    run(rank, folder)
    leave_group(folder)


def _synchronised(rank: int, folder: str) -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(layer(block="propagation"))
    assert not any(isinstance(m, MaskedBatchNorm) for m in module.modules())
    module.diffusion.method = "rows"  # torch's own module is for GPUs only
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    x = features()[own].requires_grad_()
    result = module(x, LAYER_KEYPOINTS[own])
    (result.features.sin().sum() + result.tokens.sin().sum()).backward()
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    torch.save(
        {"features": result.features.detach(), "gradient": x.grad}
        | {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
        | dict(module.named_buffers()),
        f"{folder}/{rank}.pt",
    )


def test_synchronised_batch_norm_in_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """With different numbers of samples, and of keypoints, in the processes."""
    mp.spawn(_split, (str(tmp_path), _synchronised), nprocs=2)
    module, x = layer(block="propagation"), features().requires_grad_()
    module.diffusion.method = "rows"
    result = module(x, LAYER_KEYPOINTS)
    (result.features.sin().sum() + result.tokens.sin().sum()).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = {name: torch.cat([first.pop(name), second.pop(name)]) for name in ("features", "gradient")}
    torch.testing.assert_close(whole["features"], result.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole["gradient"], x.grad, rtol=1e-3, atol=1e-5)
    expected = {f"gradient of {n}": p.grad for n, p in module.named_parameters()} | dict(module.named_buffers())
    for name, value in expected.items():
        for actual in (first[name], second[name]):
            torch.testing.assert_close(actual, value, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def _sharded(_rank: int, _folder: str) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    expected = layer()
    for name in ("", "transformer.blocks.0", "diffusion.conv1", "diffusion.conv2"):
        for method in METHODS:
            module = layer()
            module.diffusion.method = method
            fully_shard(module.get_submodule(name), mesh=mesh)
            actual = module(features(), LAYER_KEYPOINTS)
            torch.testing.assert_close(
                tuple(actual), tuple(expected(features(), LAYER_KEYPOINTS)), rtol=1e-4, atol=1e-5
            )
            actual.features.square().mean().backward()
            assert all(p.grad is not None for p in module.parameters())
    low = layer()
    policy = MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False)
    fully_shard(low, mesh=mesh, mp_policy=policy)
    low.diffusion.method = "rows"  # torch's batch norm refuses weights of another type than its running statistics
    x = features().bfloat16()
    assert low(x, LAYER_KEYPOINTS).features.dtype == torch.bfloat16
    casts = layer()
    fully_shard(casts, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    large = Keypoints(LAYER_KEYPOINTS.positions * 32, LAYER_KEYPOINTS.valid, (512, 704))
    with pytest.raises(ValueError, match="cast_forward_inputs=False"):
        casts(features(), large)


def test_fsdp2_of_a_layer_a_block_or_a_convolution(tmp_path: Path) -> None:
    mp.spawn(_split, (str(tmp_path), _sharded), nprocs=2)

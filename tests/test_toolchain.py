"""The KAF-UNet of the examples, whole, through what PyTorch offers: precision, compilers, processes, copies.

Its four layers, in the sizes used here, take all three paths of the diffusion. What one module
alone must bear is in the module's own tests.
"""

import copy
import io
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from common import TARGET, leave_group, random_keypoints
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from examples.unet import KAFUNet
from kaf_layer import GridDetector, KeypointDiffusion, Keypoints, KeypointTransformer, SIFTDetector, match_keypoints
from kaf_layer.interop import attach
from kaf_layer.losses import KAFPretrainingLoss, PCLLoss
from kaf_layer.matching import KeypointMatcher

# cuBLAS reads it when it is first used, and is not deterministic without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SIZE = (32, 48)
SMALL = {"embed_dim": 16, "depth": 1, "hidden_channels": 8}


@pytest.fixture
def device() -> str:
    return TARGET.device


def unet(device: str = "cpu", **options: object) -> KAFUNet:
    torch.manual_seed(0)
    return KAFUNet(1, 2, width=4, **SMALL, **options).to(device)


def batch(counts: tuple[int, ...] = (20, 0, 31), device: str = "cpu") -> tuple[Tensor, Keypoints]:
    images = torch.rand(len(counts), 1, *SIZE, generator=torch.Generator().manual_seed(0))
    return images.to(device), random_keypoints(SIZE, counts, dtype=torch.float32).to(device)


def gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.float().square().mean(), list(model.parameters())))


def relative_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    a, e = (torch.cat([x.float().flatten() for x in values]) for values in (actual, expected))
    return ((a - e).norm() / e.norm()).item()


# Precision and memory formats


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast(device: str, dtype: torch.dtype, tolerance: float) -> None:
    model = unet(device).eval()
    images, keypoints = batch(device=device)
    expected = model(images, keypoints)
    with torch.autocast(device, dtype):
        actual = model(images, keypoints)
    assert actual.dtype == dtype
    assert relative_difference([actual], [expected]) < tolerance
    assert relative_difference(gradients(model, actual), gradients(model, expected)) < 3 * tolerance


def test_channels_last(device: str) -> None:
    model, other = unet(device), unet(device).to(memory_format=torch.channels_last)
    images, keypoints = batch(device=device)
    actual = other(images.contiguous(memory_format=torch.channels_last), keypoints)
    expected = model(images, keypoints)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert relative_difference(gradients(other, actual), gradients(model, expected)) < 1e-3


# Compilers


def mark_dynamic(tensor: Tensor, keypoints: Keypoints) -> None:
    """The batch and the number of slots will change: a compiler that makes constants of them raises an error."""
    for value in (tensor, keypoints.positions, keypoints.valid):
        torch._dynamo.mark_dynamic(value, 0)
    for value in (keypoints.positions, keypoints.valid):
        torch._dynamo.mark_dynamic(value, 1)


def test_compiles_whole_and_once(device: str) -> None:
    """Forward and backward, with the encoder and its layers inside."""
    model = unet(device, levels=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    for counts in [(20, 0, 31), (25, 40), (22, 30, 18, 0)]:
        images, keypoints = batch(counts, device)
        mark_dynamic(images, keypoints)
        actual, expected = compiled(images, keypoints), model(images, keypoints)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        assert relative_difference(gradients(compiled, actual), gradients(model, expected)) < 1e-3
    assert counter.frame_count == 1
    for a, b in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: (unet(), batch()),
        lambda: (KeypointTransformer(8, depth=1, block="propagation"), matched(0)),
        lambda: (SIFTDetector(8, descriptors=False), [torch.rand(1, 1, 16, 24)]),
        lambda: (
            attach(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1)), {"0": 4}, detector=GridDetector(8), **SMALL),
            batch()[:1],
        ),
        lambda: (KeypointMatcher(8, depth=2, num_heads=2, position="both"), [*matched(0), *matched(1)]),
        lambda: (PCLLoss(), [torch.rand(4, 2, 8), torch.rand(4)]),
    ],
)
def test_compiles_where_a_default_device_is_set(build: Callable[[], tuple[nn.Module, Sequence[object]]]) -> None:
    """The compiler then follows fewer of a tensor's methods."""
    torch.manual_seed(0)
    module, arguments = build()
    torch.set_default_device("cpu")
    try:
        actual = torch.compile(module.eval(), fullgraph=True, backend="aot_eager")(*arguments)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(module(*arguments)))


def matched(sample: int) -> tuple[Tensor, Keypoints]:
    keypoints = batch()[1][sample : sample + 1]
    return torch.rand(*keypoints.valid.shape, 8), keypoints


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own use of TorchScript
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(device: str) -> None:
    """The attention alone: a C++ compiler takes minutes for the kernels of a whole layer."""
    transformer = KeypointTransformer(16, depth=1, block="propagation").to(device)
    compiled = torch.compile(copy.deepcopy(transformer), fullgraph=True)
    _, keypoints = batch(device=device)
    tokens = torch.randn(*keypoints.valid.shape, 16, device=device)
    actual, expected = compiled(tokens, keypoints), transformer(tokens, keypoints)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert relative_difference(gradients(compiled, actual), gradients(transformer, expected)) < 1e-3


def test_exports_with_dynamic_shapes(device: str) -> None:
    """The batch, the slots and the image's size; the keypoints' path is then the one that fits all shapes."""
    model = unet(device, levels=3).eval()
    images, keypoints = batch(device=device)
    d = Dim.DYNAMIC
    shapes = ({0: d, 2: d, 3: d}, [{0: d, 1: d}] * 2 + [(d, d), None])
    exported = torch.export.export(model, (images, keypoints), dynamic_shapes=shapes).module()
    images, keypoints = torch.rand(2, 1, 48, 64), random_keypoints((48, 64), (7, 12), dtype=torch.float32).to(device)
    torch.testing.assert_close(exported(images.to(device), keypoints), model(images.to(device), keypoints))


class TensorsIn(nn.Module):
    """ONNX knows tensors only: the keypoints come as two."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        return self.model(images, Keypoints(positions, valid, tuple(images.shape[2:])))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx(tmp_path: Path) -> None:
    """With any number of samples and keypoints; the diffusion is dense there, in operators that ONNX has."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    model = TensorsIn(unet(levels=3)).eval()
    with torch.no_grad():
        model.model.decoder.head.weight.mul_(10)  # logits of a size that 1e-4 says something about
    expected_from = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, KeypointDiffusion):
            module.method = "dense"
    images, keypoints = batch()
    shapes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
    program = torch.onnx.export(
        model, (images, keypoints.positions, keypoints.valid), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    program.save(tmp_path / "kaf_unet.onnx")
    session = runtime.InferenceSession(tmp_path / "kaf_unet.onnx", providers=["CPUExecutionProvider"])
    for counts in [(20, 0, 31), (3,), (60, 0)]:
        images, keypoints = batch(counts)
        inputs = images, keypoints.positions, keypoints.valid
        names = [i.name for i in session.get_inputs()]
        (logits,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        expected = expected_from(*inputs).detach()
        assert expected.abs().max() > 0.3
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_refuses_sift_by_name_and_at_once() -> None:
    """Before anything of the detector is traced, which takes most of a minute: even before it looks at the size."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    model = attach(backbone, {"0": 4}, detector=SIFTDetector(8), embed_dim=16, depth=1).eval()
    too_small = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match="images must have at least 6 x 6 pixels"):
        model(too_small)
    with pytest.raises(RuntimeError, match="SIFTDetector has no ONNX operators: detect outside of the graph"):
        torch.onnx.export(model, (too_small,), dynamo=True, verbose=False)


# CUDA graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_from_images_to_gradients() -> None:
    """Nothing waits for the GPU, and no size depends on what the images show: the whole step is recorded once."""
    model, detector = unet("cuda"), SIFTDetector(32, contrast_threshold=0.0)
    images, others = (torch.rand(2, 1, *SIZE, device="cuda") for _ in range(2))

    def step() -> Tensor:
        logits = model(images, detector(images))
        logits.square().mean().backward()
        return logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        logits = step()
    images.copy_(others)
    model.zero_grad(set_to_none=False)
    graph.replay()
    actual, grads = logits.clone(), [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=False)
    torch.testing.assert_close(actual, step(), atol=1e-4, rtol=1e-4)
    assert relative_difference(grads, [p.grad for p in model.parameters()]) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphed_callables() -> None:
    model, given = TensorsIn(unet("cuda")), []
    for counts in ((20, 31), (7, 0)):
        images, keypoints = batch(counts, "cuda")
        slots = 40 - keypoints.valid.shape[1]
        positions, valid = keypoints.positions, keypoints.valid
        given.append((images, F.pad(positions, (0, 0, 0, slots)), F.pad(valid, (0, slots))))
    expected = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, given[0])
    for inputs in given:
        actual, other = graphed(*inputs), expected(*inputs)
        torch.testing.assert_close(actual, other, atol=1e-4, rtol=1e-4)
        assert relative_difference(gradients(model, actual), gradients(expected, other)) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_reduced_overhead() -> None:
    model = unet("cuda", levels=3)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, mode="reduce-overhead")
    images, keypoints = batch(device="cuda")
    for _ in range(3):  # the third is a replay
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = compiled(images, keypoints), model(images, keypoints)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        assert relative_difference(gradients(compiled, actual), gradients(model, expected)) < 1e-3


@pytest.mark.parametrize("padded", [True, False])
def test_nothing_waits_for_the_device(device: str, padded: bool) -> None:
    """From images to gradients of all losses. On a GPU what waits is an error; "meta" has no values to wait for."""
    device = "meta" if device == "cpu" else device
    model = unet(device)
    detector = SIFTDetector(16) if padded else GridDetector(8)
    loss = KAFPretrainingLoss(8, 16, embed_dim=16, matcher_depth=2, num_heads=2, iterations=4).to(device)
    images, positions = torch.rand(4, 1, *SIZE, device=device), torch.rand(4, device=device)
    bottleneck = torch.rand(4, 8, 2, 3, device=device, requires_grad=True)
    for attempt in range(2):  # the first call loads kernels
        if device == "cuda" and attempt:
            torch.cuda.set_sync_debug_mode("error")
        try:
            keypoints = detector(images)
            tokens = torch.ones(*keypoints.valid.shape, 16, device=device, requires_grad=True)
            described = replace(keypoints, descriptors=torch.ones_like(tokens))
            matches = match_keypoints(described[:2], described[2:])
            total = loss(bottleneck, positions, tokens, keypoints, matches).total
            (total + model(images, keypoints).square().mean()).backward()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in model.parameters())
    assert tokens.grad.shape == tokens.shape


# Processes


def ddp_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    return {"unet": unet().eval(), "attached": attach(backbone, {"0": 4, "2": 2}, **SMALL).eval()}


def ddp_process(rank: int, folder: str) -> None:
    """Two steps on half of the batch: DDP refuses the second if the first left a parameter without gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, keypoints = batch((20, 0, 15, 31))
    half = slice(2 * rank, 2 * rank + 2)
    results = {}
    for name, model in ddp_models().items():
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(images[half], keypoints=keypoints[half]).square().mean().backward()
        results[name] = [p.grad for p in model.parameters()]
    torch.save(results, Path(folder, f"{rank}.pt"))
    leave_group(folder)


def test_ddp(tmp_path: Path) -> None:
    """Two processes have the gradients of one, for every parameter: none is unused."""
    mp.spawn(ddp_process, args=(str(tmp_path),), nprocs=2)
    images, keypoints = batch((20, 0, 15, 31))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, model in ddp_models().items():
        expected = gradients(model, model(images, keypoints=keypoints))
        for rank in ranks:
            assert relative_difference(rank[name], expected) < 1e-5


def test_every_parameter_learns_from_a_batch_without_keypoints(device: str) -> None:
    model = unet(device)
    images, keypoints = batch((0, 0), device)
    assert all(g.isfinite().all() for g in gradients(model, model(images, keypoints)))


# Activation checkpointing, copies, repetition


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_recompute(device: str, block: str) -> None:
    model, other = unet(device, block=block), unet(device, block=block, recompute=True)
    inputs = batch(device=device)
    actual, expected = other(*inputs), model(*inputs)
    torch.testing.assert_close(actual, expected)
    assert relative_difference(gradients(other, actual), gradients(model, expected)) < 1e-5
    for a, b in zip(other.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device: str, reentrant: bool) -> None:
    model = unet(device).eval()
    images, keypoints = batch(device=device)
    images.requires_grad_()
    expected = gradients(model, model(images, keypoints))
    checkpoint(model, images, keypoints, use_reentrant=reentrant).square().mean().backward()
    assert relative_difference([p.grad for p in model.parameters()], expected) < 1e-5


MODULES = {
    "KAFUNet": unet,
    "SIFTDetector": lambda: SIFTDetector(16),
    "GridDetector": lambda: GridDetector((3, 5)),
    "KAFPretrainingLoss": lambda: KAFPretrainingLoss(4, 16, embed_dim=16, matcher_depth=2),
}


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_copies(build: object) -> None:
    module = build()
    saved, weights = io.BytesIO(), io.BytesIO()
    torch.save(module, saved)
    torch.save(module.state_dict(), weights)
    loaded = build()
    loaded.load_state_dict(torch.load(io.BytesIO(weights.getvalue()), weights_only=True))
    duplicates = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(io.BytesIO(saved.getvalue()), weights_only=False),
        loaded,
    ]
    for duplicate in duplicates:
        assert repr(duplicate) == repr(module)
        torch.testing.assert_close(duplicate.state_dict(), module.state_dict(), atol=0, rtol=0)
        if isinstance(module, KAFUNet):
            assert torch.equal(duplicate.eval()(*batch()), module.eval()(*batch()))


def test_keypoints_pickle() -> None:
    """As the workers of a DataLoader hand them over."""
    _, keypoints = batch()
    loaded = pickle.loads(pickle.dumps(keypoints))
    assert torch.equal(loaded.valid, keypoints.valid)
    assert loaded.image_size == keypoints.image_size


def train(device: str, block: str) -> dict[str, Tensor]:
    """A few seeded steps, from detection on."""
    model = unet(device, block=block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, _ = batch(device=device)
    detector = SIFTDetector(32, contrast_threshold=0.0)
    for _ in range(3):
        loss = model(images, detector(images)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict() | {"loss": loss.detach()}


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_seeded_runs_are_bit_identical(device: str, block: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(train(device, block), train(device, block), atol=0, rtol=0)
    finally:
        torch.use_deterministic_algorithms(False)

"""The positional contrastive loss against a loop in float64, the authors' numbers, and a second library."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import TARGET, checks_values, generator, leave_group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kaf_layer.losses.pcl import PCLLoss, pcl_loss

pytestmark = pytest.mark.usefixtures("on_device")
REFERENCE = Path(__file__).parents[3] / "shared/reference/authors_reference.npz"


def naive(embeddings: Tensor, positions: Tensor, temperature: float, threshold: float) -> Tensor:
    """Eq. 1 with loops."""
    slices = [(b, v) for b in range(embeddings.shape[0]) for v in range(embeddings.shape[1])]
    terms = []
    for i in slices:
        similarity = {
            j: torch.cosine_similarity(embeddings[i], embeddings[j], dim=0) / temperature for j in slices if j != i
        }
        positives = [j for j in similarity if abs(positions[i[0]] - positions[j[0]]) < threshold]
        if positives:
            denominator = sum(similarity[j].exp() for j in similarity)
            terms.append(-sum((similarity[j].exp() / denominator).log() for j in positives) / len(positives))
    return sum(terms) / len(terms) if terms else embeddings.sum() * 0


def batch(slices: int, views: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draws = generator(seed)
    embeddings = torch.randn(slices, views, 16, generator=draws, dtype=dtype)
    return embeddings.requires_grad_(), torch.rand(slices, generator=draws, dtype=dtype)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("temperature", "threshold"), [(0.1, 0.1), (0.07, 0.35), (1.0, 2.0)])
def test_loop(views: int, temperature: float, threshold: float) -> None:
    embeddings, positions = batch(6, views)
    loss = pcl_loss(embeddings, positions, temperature=temperature, threshold=threshold)
    expected = naive(embeddings, positions, temperature, threshold)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    grad, expected_grad = (torch.autograd.grad(value, embeddings)[0] for value in (loss, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the authors' numbers are not at hand (../shared/reference)")
@pytest.mark.parametrize(("threshold", "temperature"), [(0.1, 0.1), (0.35, 0.1), (0.35, 0.07)])
def test_authors(threshold: float, temperature: float) -> None:
    reference = np.load(REFERENCE)
    embeddings = torch.tensor(reference["pcl.features"], requires_grad=True)
    loss = PCLLoss(temperature=temperature, threshold=threshold)(embeddings, torch.tensor(reference["pcl.positions"]))
    loss = loss * temperature / 0.07
    loss.backward()
    key = f"threshold={threshold}.temperature={temperature}"
    torch.testing.assert_close(loss.detach(), torch.tensor(reference[f"pcl.loss.{key}"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(embeddings.grad, torch.tensor(reference[f"pcl.grad.{key}"]), rtol=1e-5, atol=1e-6)


def test_second_library() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, positions = batch(7, 2)
    position = positions.repeat_interleave(2)
    positive = (position[:, None] - position).abs() < 0.2
    pairs = ~torch.eye(14, dtype=torch.bool)
    indices = (*(positive & pairs).nonzero(as_tuple=True), *(~positive & pairs).nonzero(as_tuple=True))
    expected = losses.SupConLoss(temperature=0.1)(embeddings.flatten(0, 1), indices_tuple=indices)
    torch.testing.assert_close(pcl_loss(embeddings, positions, threshold=0.2), expected, rtol=1e-8, atol=0)


def test_without_positives() -> None:
    embeddings, _ = batch(3, 1)
    loss = pcl_loss(embeddings, torch.tensor([0.0, 0.5, 1.0]), threshold=0.1)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_slices_at_the_threshold_are_no_positives() -> None:
    embeddings, _ = batch(3, 1)
    positions = torch.tensor([0.25, 0.5, 1.0])
    assert pcl_loss(embeddings, positions, threshold=0.25) == 0
    assert pcl_loss(embeddings, positions, threshold=0.2501) > 0


@pytest.mark.parametrize("shape", [(0, 2, 4), (0, 1, 4), (3, 0, 4)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    embeddings = torch.zeros(shape, requires_grad=True)
    loss = pcl_loss(embeddings, torch.zeros(shape[0]))
    assert loss == 0
    assert torch.autograd.grad(loss, embeddings)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float16])
def test_positions_of_any_type(dtype: torch.dtype) -> None:
    embeddings, _ = batch(4, 2)
    positions = torch.tensor([1, 0, 1, 0]).to(dtype)  # as unsigned integers 0 - 1 is 255
    expected = naive(embeddings, positions.double(), 0.1, 1.5)
    torch.testing.assert_close(pcl_loss(embeddings, positions, threshold=1.5), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_low_precision(dtype: torch.dtype, temperature: float) -> None:
    embeddings, positions = batch(6, 2, dtype=torch.float32)
    low = embeddings.detach().to(dtype).requires_grad_()
    with torch.autocast(TARGET.device, dtype):
        loss = pcl_loss(low, positions, temperature=temperature, threshold=0.2)
    loss.backward()
    exact = low.detach().double().requires_grad_()
    expected = pcl_loss(exact, positions.double(), temperature=temperature, threshold=0.2)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_identical_embeddings(value: float) -> None:
    embeddings = torch.full((4, 2, 8), value, requires_grad=True)
    loss = pcl_loss(embeddings, torch.linspace(0, 1, 4), temperature=0.01)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(7.0).log())
    assert embeddings.grad.isfinite().all()


def test_options_reach_the_function() -> None:
    embeddings, positions = batch(5, 2)
    options = {"temperature": 0.5, "threshold": 0.3}
    assert PCLLoss(**options)(embeddings, positions) == pcl_loss(embeddings, positions, **options)
    assert not PCLLoss().gather_distributed


def test_compiles() -> None:
    embeddings, positions = batch(4, 2)
    loss = PCLLoss(threshold=0.3, gather_distributed=True)  # without processes: the same as without it
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(embeddings, positions), loss(embeddings, positions))


@checks_values
@pytest.mark.parametrize("positions", [[0.0, 50.0, 10.0, 60.0], [0.0, 0.5, 1.01, 1.0], [-0.1, 0.5, 0.2, 0.3]])
@pytest.mark.parametrize("compiled", [False, True])
def test_positions_that_are_not_relative_are_refused(positions: list[float], compiled: bool) -> None:
    """With slice numbers or millimetres nothing would be near anything, and the loss would be zero."""
    embeddings, _ = batch(4, 2)
    loss = torch.compile(PCLLoss(), fullgraph=True, backend="aot_eager") if compiled else PCLLoss()
    with pytest.raises(
        RuntimeError if compiled else ValueError, match="positions must be finite and relative, from 0 to 1"
    ):
        loss(embeddings, torch.tensor(positions))


@checks_values
def test_errors() -> None:
    embeddings, positions = batch(4, 2)
    with pytest.raises(ValueError, match=r"positions must be \(B,\)"):
        pcl_loss(embeddings, positions[:, None])
    with pytest.raises(ValueError, match=r"embeddings must be \(B, V, E\)"):
        pcl_loss(embeddings[:, 0], positions)
    with pytest.raises(ValueError, match="embeddings must be two or more"):
        pcl_loss(embeddings[:1, :1], positions[:1])
    with pytest.raises(ValueError, match="temperature=0"):
        PCLLoss(temperature=0)
    with pytest.raises(ValueError, match="threshold=-1"):
        pcl_loss(embeddings, positions, threshold=-1)
    with pytest.raises(ValueError, match=r"embeddings must be finite.* samples \[2\]"):
        pcl_loss(embeddings.masked_fill(torch.arange(4)[:, None, None] == 2, torch.nan), positions)
    with pytest.raises(ValueError, match=r"positions must be finite.* samples \[0\]"):
        pcl_loss(embeddings, positions.masked_fill(torch.arange(4) == 0, torch.nan))


def process(rank: int, world: int, folder: str) -> None:
    """What each process of ``test_processes`` runs: DDP on its share, then a batch of another size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    images, positions = shared_batch()
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)
    model = DistributedDataParallel(projector())
    loss = PCLLoss(threshold=0.1, gather_distributed=True)(model(images[share]), positions[share])
    loss.backward()
    result = {"loss": loss.item(), "grads": [p.grad.tolist() for p in model.parameters()]}
    try:
        pcl_loss(torch.ones(2 + rank, 2, 4), torch.zeros(2 + rank), gather_distributed=True)
    except ValueError as error:
        result["error"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    leave_group(folder)


def projector() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, 8, dtype=torch.float64)


def shared_batch() -> tuple[Tensor, Tensor]:
    """One view each, so that slices 0 to 2 have positives, and the others none."""
    draws = torch.Generator().manual_seed(0)
    positions = torch.tensor([0.0, 0.05, 0.08, 0.3, 0.6, 0.9], dtype=torch.float64)
    return torch.randn(6, 1, 5, generator=draws, dtype=torch.float64), positions


@pytest.mark.parametrize("world", [2, 3])
def test_processes(world: int, tmp_path: Path) -> None:
    mp.spawn(process, args=(world, str(tmp_path)), nprocs=world)
    with torch.device("cpu"):
        images, positions = shared_batch()
        model = projector()
        loss = pcl_loss(model(images), positions, threshold=0.1)
        loss.backward()
        for rank in range(world):
            result = json.loads((tmp_path / f"{rank}.json").read_text())
            assert result["loss"] == pytest.approx(loss.item(), abs=1e-6)
            for grad, parameter in zip(result["grads"], model.parameters(), strict=True):
                torch.testing.assert_close(torch.tensor(grad, dtype=torch.float64), parameter.grad, rtol=0, atol=1e-6)
            assert "same batch size" in result["error"]
            assert f"rank {rank} has {2 + rank}" in result["error"]

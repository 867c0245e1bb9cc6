"""The pretraining loss is the weighted sum of its parts, and does no work for a weight of zero."""

import dataclasses
import warnings

import pytest
import torch
from common import TARGET, checks_values, fill_padding, generator, random_keypoints
from torch import Tensor

from kaf_layer import Keypoints
from kaf_layer.losses import KAFPretrainingLoss, pcl_loss
from kaf_layer.matching import Matches

pytestmark = pytest.mark.usefixtures("on_device")
SIZE = (24, 40)


def inputs(garbage: float = float("nan")) -> tuple[Tensor, Tensor, list[Tensor], Keypoints, Matches]:
    """Three pairs, of one the first image, of one both without keypoints."""
    draws = generator(0)
    keypoints = random_keypoints(SIZE, (5, 0, 0, 6, 4, 0), slots=7, garbage=garbage)
    tokens = [
        fill_padding(torch.randn(6, 7, size, generator=draws, dtype=torch.float64), keypoints, garbage)
        for size in (8, 16)
    ]
    matches = Matches(torch.full((3, 7), -1), torch.full((3, 7), -1))
    i, j = (keypoints.valid[sample].nonzero()[1] for sample in (0, 3))
    matches.indices[0, i], matches.inverse[0, j] = j, i
    bottleneck = torch.randn(6, 12, 3, 5, generator=draws, dtype=torch.float64)
    positions = torch.tensor([0.1, 0.5, 0.9, 0.15, 0.52, 0.88], dtype=torch.float64)
    return bottleneck, positions, tokens, keypoints, matches


def loss_of(weights: tuple[float, float, float], **options: bool) -> KAFPretrainingLoss:
    torch.manual_seed(0)
    return KAFPretrainingLoss(12, 24, embed_dim=16, num_heads=2, weights=weights, threshold=0.06, **options).double()


def test_parts() -> None:
    loss = loss_of((1.0, 1.0, 0.01), batch_norm=False)
    bottleneck, positions, tokens, keypoints, matches = inputs()
    losses = loss(bottleneck, positions, tokens, keypoints, matches)
    pooled = torch.stack([image.mean(dim=(1, 2)) for image in bottleneck])
    torch.testing.assert_close(losses.bottleneck, pcl_loss(loss.projector(pooled)[:, None], positions, threshold=0.06))
    features = [loss.token_mlp(torch.cat([t[i][keypoints.valid[i]] for t in tokens], dim=1)) for i in range(6)]
    embeddings = torch.stack([f.mean(dim=0) if len(f) else torch.zeros(16, dtype=torch.float64) for f in features])
    torch.testing.assert_close(losses.keypoints, pcl_loss(embeddings[:, None], positions, threshold=0.06))
    padded = torch.zeros(6, 7, 16, dtype=torch.float64)
    for i, feature in enumerate(features):
        padded[i, keypoints.valid[i]] = feature
    torch.testing.assert_close(
        losses.matching, loss.match(padded[:3], keypoints[:3], padded[3:], keypoints[3:], matches)
    )
    torch.testing.assert_close(losses.total, losses.bottleneck + losses.keypoints + 0.01 * losses.matching)
    assert not any(part.requires_grad for part in losses[1:])


def test_padding_influences_nothing() -> None:
    loss = loss_of((1.0, 1.0, 0.01))
    grads = []
    for garbage in (float("nan"), 7.0):
        bottleneck, positions, tokens, *rest = inputs(garbage)
        leaves = [scale.requires_grad_() for scale in tokens]
        total = loss(bottleneck, positions, leaves, *rest).total
        grads.append(torch.autograd.grad(total, (*leaves, *loss.parameters())))
        assert all(grad.isfinite().all() for grad in grads[-1])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, 0.0)])
def test_weights_of_zero(weights: tuple[float, float, float]) -> None:
    given = inputs()
    full, part = loss_of((1.0, 1.0, 1.0)), loss_of(weights)
    part.load_state_dict({name: value for name, value in full.state_dict().items() if name in part.state_dict()})
    expected = full(*given)
    bottleneck, positions, *rest = given
    losses = part(bottleneck, positions, *rest[: 0 if not any(weights[1:]) else 2 + bool(weights[2])])
    for weight, value, other in zip(weights, losses[1:], expected[1:], strict=True):
        torch.testing.assert_close(value, other) if weight else torch.testing.assert_close(value.item(), 0.0)
    torch.testing.assert_close(losses.total, sum(w * v for w, v in zip(weights, expected[1:], strict=True)))
    grads = torch.autograd.grad(losses.total, list(part.parameters()), allow_unused=True)
    assert all(grad is not None for grad in grads)  # no parameter that DDP would miss


def test_options_reach_the_parts() -> None:
    options = {"temperature": 0.3, "threshold": 0.2, "matcher_depth": 3, "num_heads": 2, "iterations": 7}
    loss = KAFPretrainingLoss(12, 24, embed_dim=16, spatial_dims=3, **options)
    matcher = loss.match.matcher
    assert (loss.contrast.temperature, loss.contrast.threshold) == (0.3, 0.2)
    assert (len(matcher.blocks), matcher.iterations, matcher.position_encoder.spatial_dims) == (3, 7, 3)
    assert all(block.attention.num_heads == 2 for block in matcher.blocks)
    assert matcher.out.in_features == 16
    assert not loss.contrast.gather_distributed
    assert KAFPretrainingLoss(12, gather_distributed=True, weights=(1.0, 0.0, 0.0)).contrast.gather_distributed


def test_the_projection_may_begin_with_a_batch_norm() -> None:
    loss = KAFPretrainingLoss(12, weights=(1.0, 0.0, 0.0), threshold=0.06).double()  # by default it does
    bottleneck, positions, *_ = inputs()
    pooled = bottleneck.mean(dim=(2, 3))
    standard = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-5).sqrt()
    expected = pcl_loss(loss.projector(standard)[:, None], positions, threshold=0.06)
    torch.testing.assert_close(loss(bottleneck, positions).total, expected)
    assert KAFPretrainingLoss(12, 24, weights=(0.0, 1.0, 0.0), batch_norm=True).norm is None


def test_with_a_batch_norm_the_contrast_begins() -> None:
    """Of averages that differ by a hundredth, as an untrained encoder's: without the norm 50 steps teach nothing."""

    def after_training(*, batch_norm: bool) -> float:
        torch.manual_seed(0)
        loss = KAFPretrainingLoss(12, embed_dim=16, weights=(1.0, 0.0, 0.0), threshold=0.1, batch_norm=batch_norm)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.03)
        positions = torch.rand(16)
        bottleneck = 1 + 0.01 * torch.stack([positions, positions**2, *torch.rand(10, 16)], dim=1)[..., None, None]
        for _ in range(50):
            total = loss(bottleneck, positions).total
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return total.item()

    chance = torch.tensor(15.0).log().item()
    assert after_training(batch_norm=False) == pytest.approx(chance, abs=0.01)
    assert after_training(batch_norm=True) < chance - 0.2


@pytest.mark.parametrize("batch_norm", [False, True])
def test_empty_batch(batch_norm: bool) -> None:
    loss = loss_of((1.0, 1.0, 0.01), batch_norm=batch_norm)
    bottleneck, positions, tokens, keypoints, matches = inputs()
    none = Matches(matches.indices[:0], matches.inverse[:0])
    losses = loss(bottleneck[:0], positions[:0], [scale[:0] for scale in tokens], keypoints[:0], none)
    assert not any(losses)
    losses.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in loss.parameters())
    assert loss.projector[0].weight.grad is not None


@checks_values
def test_positions_in_millimetres_are_refused() -> None:
    bottleneck, positions, *rest = inputs()
    with pytest.raises(ValueError, match="positions must be finite and relative, from 0 to 1"):
        loss_of((1.0, 1.0, 0.01))(bottleneck, 100 * positions, *rest)


def test_compiles() -> None:
    torch.manual_seed(0)
    loss = KAFPretrainingLoss(12, 24, embed_dim=16, num_heads=2, matcher_depth=2).double()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    losses, expected = compiled(*inputs()), loss(*inputs())
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(*(torch.autograd.grad(total, loss.parameters()) for total, *_ in (losses, expected)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_never_waits() -> None:
    loss = loss_of((1.0, 1.0, 0.01)).cuda()
    bottleneck, positions, tokens, keypoints, matches = inputs()
    given = bottleneck.cuda(), positions.cuda(), [t.cuda() for t in tokens], keypoints.to("cuda"), matches.to("cuda")
    expected = loss_of((1.0, 1.0, 0.01))(*inputs()).total
    torch.testing.assert_close(loss(*given).total.cpu(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss(*given).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    loss = loss_of((1.0, 1.0, 0.01)).float()
    bottleneck, positions, tokens, keypoints, matches = inputs()
    given = bottleneck.float(), positions, [t.float() for t in tokens], keypoints.to(torch.float32), matches
    with torch.autocast(TARGET.device, dtype):
        low = loss(*given)
    exact = loss(*given)
    assert all(part.dtype == torch.float32 for part in low)
    torch.testing.assert_close(low.total, exact.total, rtol=0.05, atol=0)
    low.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


@checks_values
def test_errors() -> None:
    with pytest.raises(ValueError, match="none negative"):
        loss_of((1.0, -1.0, 0.0))
    with pytest.raises(ValueError, match="token_channels must be 1 or more"):
        KAFPretrainingLoss(12)
    loss = loss_of((1.0, 1.0, 0.01))
    bottleneck, positions, tokens, keypoints, matches = inputs()
    with pytest.raises(ValueError, match="bottleneck must be"):
        loss(bottleneck[:, :4], positions, tokens, keypoints, matches)
    with pytest.raises(ValueError, match="tokens and keypoints must be given"):
        loss(bottleneck, positions)
    with pytest.raises(ValueError, match="24 channels together"):
        loss(bottleneck, positions, tokens[:1], keypoints, matches)
    with pytest.raises(ValueError, match="matches must be given"):
        loss(bottleneck, positions, tokens, keypoints)
    with pytest.raises(ValueError, match=r"half as many samples.* got 1"):
        loss(bottleneck, positions, tokens, keypoints, Matches(matches.indices[:1], matches.inverse[:1]))
    moved = dataclasses.replace(keypoints, valid=torch.zeros_like(keypoints.valid))
    with pytest.raises(ValueError, match="matches must be between valid keypoints"):
        loss(bottleneck, positions, tokens, moved, matches)

"""The matching loss against a loop, and the authors' numbers."""

import dataclasses

import pytest
import torch
from common import checks_values, generator, random_keypoints
from reference import needs_reference, numbers
from torch import Tensor

from kaf_layer import Keypoints
from kaf_layer.losses import KeypointMatchLoss, keypoint_match_loss
from kaf_layer.matching import Matches, log_sinkhorn

pytestmark = pytest.mark.usefixtures("on_device")
SIZE = (24, 40)


@needs_reference
def test_authors() -> None:
    values = numbers()
    a, b = (
        Keypoints(yx, torch.ones(yx.shape[:2], dtype=torch.bool), (64, 64))
        for yx in (values["matcher.keypoints0_yx"], values["matcher.keypoints1_yx"])
    )
    matches = Matches(torch.full((2, 24), -1), torch.full((2, 20), -1))
    for sample, i, j in values["matcher.matches"].tolist():
        if i >= 0 and j >= 0:
            matches.indices[sample, i], matches.inverse[sample, j] = j, i
    for name, weights in (("loss", (0.45, 1.0)), ("positive_loss", (0.45, 0.0)), ("negative_loss", (0.0, 1.0))):
        options = dict(zip(("positive_weight", "negative_weight"), weights, strict=True))
        loss = keypoint_match_loss(values["matcher.log_assignment"], a, b, matches, **options)
        torch.testing.assert_close(loss, values[f"matcher.{name}"], rtol=1e-5, atol=0)


def example() -> tuple[Tensor, Keypoints, Keypoints, Matches]:
    """Five pairs: with matches; without; no keypoint in b; none in a; none at all."""
    a = random_keypoints(SIZE, (5, 4, 3, 0, 0), slots=7, seed=1)
    b = random_keypoints(SIZE, (6, 2, 0, 4, 0), slots=8, seed=2)
    matches = Matches(torch.full((5, 7), -1), torch.full((5, 8), -1))
    slots_a, slots_b = a.valid[0].nonzero().flatten(), b.valid[0].nonzero().flatten()
    matches.indices[0, slots_a[:3]], matches.inverse[0, slots_b[2:5]] = slots_b[2:5], slots_a[:3]
    draws = generator(0)
    scores = torch.randn(5, 7, 8, generator=draws, dtype=torch.float64, requires_grad=True)
    return scores, a, b, matches


def test_loop() -> None:
    scores, a, b, matches = example()
    log_assignment = log_sinkhorn(scores, torch.tensor(1.0, dtype=torch.float64), valid_a=a.valid, valid_b=b.valid)
    expected = torch.tensor(0.0, dtype=torch.float64)
    for s in range(5):
        matched, alone = [], []
        for i in range(7):
            if a.valid[s, i]:
                j = matches.indices[s, i]
                (matched if j >= 0 else alone).append(-log_assignment[s, i, j if j >= 0 else 8])
        alone += [-log_assignment[s, 7, j] for j in range(8) if b.valid[s, j] and matches.inverse[s, j] < 0]
        expected = expected + 2.0 * sum(matched) / max(len(matched), 1) + 0.5 * sum(alone) / max(len(alone), 1)
    loss = keypoint_match_loss(log_assignment, a, b, matches, positive_weight=2.0, negative_weight=0.5)
    torch.testing.assert_close(loss, expected / 5)
    grad, expected_grad = (torch.autograd.grad(value, scores, retain_graph=True)[0] for value in (loss, expected / 5))
    torch.testing.assert_close(grad, expected_grad)
    assert (grad[2:] == 0).all()  # nothing to learn


@pytest.mark.parametrize("sample", range(5))
def test_module_is_finite(sample: int) -> None:
    torch.manual_seed(0)
    loss = KeypointMatchLoss(16, num_heads=2).double()
    _, a, b, matches = example()
    a, b, one = a[sample : sample + 1], b[sample : sample + 1], slice(sample, sample + 1)
    matches = Matches(matches.indices[one], matches.inverse[one])
    tokens = [torch.randn(1, number, 16, dtype=torch.float64, requires_grad=True) for number in (7, 8)]
    value = loss(tokens[0], a, tokens[1], b, matches)
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in (*loss.parameters(), *tokens))
    if sample >= 2:
        assert value == 0
        assert all(p.grad.abs().max() < 1e-12 for p in tokens)


def test_a_batch_is_the_mean_of_its_samples() -> None:
    scores, a, b, matches = example()
    log_assignment = log_sinkhorn(scores.detach(), scores.new_ones(()), valid_a=a.valid, valid_b=b.valid)
    alone = [
        keypoint_match_loss(log_assignment[i], a[i], b[i], Matches(matches.indices[i], matches.inverse[i]))
        for i in (slice(k, k + 1) for k in range(5))
    ]
    torch.testing.assert_close(keypoint_match_loss(log_assignment, a, b, matches), sum(alone) / 5)


def test_empty_batch() -> None:
    _, a, b, matches = example()
    tokens = [torch.zeros(0, slots, 16, requires_grad=True) for slots in (7, 8)]
    loss = KeypointMatchLoss(16, num_heads=2)
    value = loss(tokens[0], a[:0], tokens[1], b[:0], Matches(matches.indices[:0], matches.inverse[:0]))
    assert value == 0
    value.backward()
    assert all(token.grad is not None for token in tokens)
    assert not any(p.grad.any() for p in loss.parameters() if p.grad is not None)


def test_compiles() -> None:
    scores, *rest = example()
    log_assignment = log_sinkhorn(scores.detach(), scores.new_ones(()), valid_a=rest[0].valid, valid_b=rest[1].valid)
    compiled = torch.compile(keypoint_match_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(log_assignment, *rest), keypoint_match_loss(log_assignment, *rest))


@checks_values
def test_errors() -> None:
    scores, a, b, matches = example()
    log_assignment = scores.new_zeros(5, 8, 9)
    keypoint_match_loss(log_assignment, a, b, matches)
    with pytest.raises(ValueError, match="log_assignment must be"):
        keypoint_match_loss(scores, a, b, matches)
    with pytest.raises(ValueError, match="matches must be of these keypoints"):
        keypoint_match_loss(log_assignment, a, b, Matches(matches.inverse, matches.indices))
    far = Matches(matches.indices.masked_fill(matches.indices >= 0, 8), matches.inverse)
    with pytest.raises(ValueError, match=r"slots of b, 0 to 7, or -1.* samples \[0\]"):
        keypoint_match_loss(log_assignment, a, b, far)
    moved = dataclasses.replace(a, valid=torch.zeros_like(a.valid))
    with pytest.raises(ValueError, match=r"valid keypoints \(call matches.among.* samples \[0\]"):
        keypoint_match_loss(log_assignment, moved, b, matches)

"""The matching network: the authors' numbers, and indifference to padding."""

import pytest
import torch
from common import fill_padding, random_keypoints
from reference import needs_reference, numbers, state_dict
from torch import Tensor

from kaf_layer import Keypoints
from kaf_layer.interop import load_authors_state_dict
from kaf_layer.matching import KeypointMatcher

SIZE = (24, 40)


def authors_matcher() -> KeypointMatcher:
    matcher = KeypointMatcher()
    load_authors_state_dict(matcher, state_dict("matcher"))
    return matcher.eval()


def authors_inputs() -> tuple[Tensor, Keypoints, Tensor, Keypoints]:
    values = numbers()
    inputs = []
    for i in "01":
        yx = values[f"matcher.keypoints{i}_yx"]
        valid = torch.ones(yx.shape[:2], dtype=torch.bool)
        inputs += [values[f"matcher.descriptors{i}"].mT, Keypoints(yx.flip(-1), valid, (64, 64))]
    return tuple(inputs)


@needs_reference
def test_authors() -> None:
    expected = numbers()["matcher.log_assignment"]
    torch.testing.assert_close(authors_matcher()(*authors_inputs()), expected, rtol=0, atol=1e-4)


def inputs(
    *, garbage: float = float("nan"), slots: tuple[int, int] = (9, 11)
) -> tuple[Tensor, Keypoints, Tensor, Keypoints]:
    """Four pairs of images: keypoints on both sides, on one, on the other, on none."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for counts, number, seed in (((7, 5, 0, 0), slots[0], 1), ((9, 0, 4, 0), slots[1], 2)):
        keypoints = random_keypoints(SIZE, counts, slots=number, seed=seed, garbage=garbage)
        tokens = torch.randn(4, number, 16, generator=generator, dtype=torch.float64)
        result += [fill_padding(tokens, keypoints, garbage).requires_grad_(), keypoints]
    return tuple(result)


@pytest.mark.parametrize("training", [True, False])
def test_padding_influences_nothing(training: bool) -> None:
    torch.manual_seed(0)
    matcher = KeypointMatcher(16, num_heads=2).double().train(training)
    outcomes = []
    for garbage in (float("nan"), 7.0):
        given = inputs(garbage=garbage)
        log_assignment = matcher(*given)
        there = log_assignment > -torch.inf
        grads = torch.autograd.grad(log_assignment[there].square().sum(), (given[0], given[2], *matcher.parameters()))
        assert all(grad.isfinite().all() for grad in grads)
        outcomes.append((log_assignment.detach(), *grads))
    torch.testing.assert_close(*outcomes)
    log_assignment = outcomes[0][0]
    _, a, _, b = inputs()
    assert not log_assignment.isnan().any()
    assert (log_assignment[:, :-1] == -torch.inf).all(dim=2).equal(~a.valid)
    assert (log_assignment[:, :, :-1] == -torch.inf).all(dim=1).equal(~b.valid)
    torch.testing.assert_close(log_assignment[:, :, :-1].exp().sum(dim=1), b.valid.double())
    assert (log_assignment[1, :-1, -1][a.valid[1]] == 0).all()  # nobody there: to the dustbin, surely
    assert (log_assignment[2, -1, :-1][b.valid[2]] == 0).all()


def test_alone_as_in_a_batch() -> None:
    torch.manual_seed(0)
    matcher = KeypointMatcher(16, num_heads=2).double().eval()
    tokens_a, a, tokens_b, b = inputs()
    together = matcher(tokens_a, a, tokens_b, b)
    for i in range(4):
        alone_a, alone_b = a.valid[i], b.valid[i]
        one = [
            (tokens[i, slots][None], Keypoints(kp.positions[i, slots][None], kp.valid[i, slots][None], SIZE))
            for tokens, kp, slots in ((tokens_a, a, alone_a), (tokens_b, b, alone_b))
            if slots.any()
        ]
        if len(one) == 2:
            rows, columns = (torch.cat([slots, torch.tensor([True])]) for slots in (alone_a, alone_b))
            torch.testing.assert_close(matcher(*one[0], *one[1])[0], together[i][rows][:, columns])


def test_symmetric() -> None:
    """Swapping the images transposes the assignment, once Sinkhorn's iterations have converged."""
    torch.manual_seed(0)
    matcher = KeypointMatcher(16, num_heads=2, iterations=300).double().eval()
    tokens_a, a, tokens_b, b = inputs()
    torch.testing.assert_close(
        matcher(tokens_a, a, tokens_b, b).exp(), matcher(tokens_b, b, tokens_a, a).mT.exp(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matcher = KeypointMatcher(16, num_heads=2)
    tokens_a, a, tokens_b, b = (
        value.detach().float() if isinstance(value, Tensor) else value.to(torch.float32) for value in inputs()
    )
    with torch.autocast("cpu", dtype):
        low = matcher(tokens_a, a, tokens_b, b)
    exact = matcher(tokens_a, a, tokens_b, b)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.exp(), exact.exp(), rtol=0, atol=0.1)


def test_single_precision() -> None:
    torch.manual_seed(0)
    matcher = KeypointMatcher(16, num_heads=2, depth=2).double()
    given = inputs()
    exact = matcher(*given)
    single = matcher.float()(*(value.float() if isinstance(value, Tensor) else value for value in given))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.exp().double(), exact.exp(), rtol=0, atol=1e-4)


def test_options() -> None:
    torch.manual_seed(0)
    matcher = KeypointMatcher(16, num_heads=2, depth=3, iterations=1).double().eval()
    assert len(matcher.blocks) == 3
    once = matcher(*inputs()).exp()
    matcher.iterations = 50
    valid = inputs()[1].valid
    assert (once[:, :-1].sum(dim=2) - 1)[valid].abs().max() > 1e-3  # rows are not yet normalised
    assert (matcher(*inputs()).exp()[:, :-1].sum(dim=2) - 1)[valid].abs().max() < 1e-4
    assert len(KeypointMatcher(16).blocks) == 4


def test_compiles() -> None:
    torch.manual_seed(0)
    matcher = KeypointMatcher(16, num_heads=2, depth=2).double()
    compiled = torch.compile(matcher, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), matcher(*inputs()))


def test_errors() -> None:
    matcher = KeypointMatcher(16, num_heads=2).double()
    tokens_a, a, tokens_b, b = inputs()
    with pytest.raises(ValueError, match="tokens_a must be"):
        matcher(tokens_b, a, tokens_a, b)
    with pytest.raises(ValueError, match="tokens_b must be"):
        matcher(tokens_a, a, tokens_a, b)
    with pytest.raises(ValueError, match="embed_dim must be"):
        KeypointMatcher(0)
    with pytest.raises(ValueError, match="iterations must be"):
        KeypointMatcher(8, iterations=0)
    with pytest.raises(ValueError, match="same batch size"):
        matcher(tokens_a, a, tokens_b[:2], b[:2])

"""Keypoint matching as a self-supervised loss: the tokens of a structure in two images should match."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn

from kaf_layer.checks import check_floats, check_keypoints, raise_where
from kaf_layer.keypoints import Keypoints
from kaf_layer.matching import KeypointMatcher, Matches
from kaf_layer.matching.correspondence import check_matches

__all__ = ["KeypointMatchLoss", "keypoint_match_loss"]


def keypoint_match_loss(
    log_assignment: Annotated[Tensor, "B N_a+1 N_b+1"],
    keypoints_a: Keypoints,
    keypoints_b: Keypoints,
    matches: Matches,
    *,
    positive_weight: float = 0.45,
    negative_weight: float = 1.0,
) -> Annotated[Tensor, ""]:
    """The negative log-likelihood of matches and of unmatched keypoints.

    This is [KeypointMatchLoss][kaf_layer.KeypointMatchLoss] as a function.

    Args:
        log_assignment: log-probabilities of all pairs, dustbins last, as
            [KeypointMatcher][kaf_layer.KeypointMatcher] gives.
        keypoints_a: the keypoints of the rows.
        keypoints_b: the keypoints of the columns.
        matches: the matches between these keypoints.
        positive_weight: the weight of matched pairs.
        negative_weight: the weight of keypoints without a partner.
    """
    _check(log_assignment, keypoints_a, keypoints_b, matches)
    alone = matches.indices < 0
    # The authors' bounds: a probability below exp(-100) counts as exp(-100), one above 1 (before convergence) as 1.
    cost = -log_assignment.clamp(-100.0, 0.0)
    dustbin = log_assignment.shape[2] - 1
    of_a = cost[:, :-1].gather(2, matches.indices.masked_fill(alone, dustbin)[..., None]).squeeze(-1)
    of_b = cost[:, -1, :-1]
    matched, alone_a = keypoints_a.valid & ~alone, keypoints_a.valid & alone
    alone_b = keypoints_b.valid & (matches.inverse < 0)
    # A match stands in both directions; the rows of a hold each once.
    positive = _total(of_a, matched) / matched.sum(dim=1).clamp(min=1)
    unmatched = alone_a.sum(dim=1) + alone_b.sum(dim=1)
    negative = (_total(of_a, alone_a) + _total(of_b, alone_b)) / unmatched.clamp(min=1)
    return (positive_weight * positive + negative_weight * negative).sum() / max(cost.shape[0], 1)


def _total(cost: Annotated[Tensor, "B N"], mask: Annotated[Tensor, "B N"]) -> Annotated[Tensor, "B"]:
    return cost.where(mask, 0.0).sum(dim=1)


class KeypointMatchLoss(nn.Module):
    r"""The loss of matching keypoints by their tokens (Yang et al., NeurIPS 2023, Eq. 2).

    With the assignment P of a [KeypointMatcher][kaf_layer.KeypointMatcher], the matches M, and the keypoints I of a
    and J of b that have no partner, it is the mean over samples of

    .. math:: -\frac{w_+}{|M|} \sum_{(i, j) \in M} \log P_{ij}
        - \frac{w_-}{|I| + |J|} \left(\sum_{i \in I} \log P_{i, N_b + 1} + \sum_{j \in J} \log P_{N_a + 1, j}\right)

    where a sum or a mean over nothing is zero, and so is the loss of an empty batch. It is computed in float32, or
    float64 for float64 tokens.

    Args:
        embed_dim: E, the channels of a token.
        positive_weight: the weight of matched pairs; the default is the authors'.
        negative_weight: the weight of keypoints without a partner.
        **matcher: further options of the [KeypointMatcher][kaf_layer.KeypointMatcher], such as ``depth`` or ``device``.

    Shape:
        - tokens_a: (B, N_a, E), one for each slot of keypoints_a.
        - tokens_b: (B, N_b, E), one for each slot of keypoints_b.
        - matches: the matches between these keypoints, as [match_keypoints][kaf_layer.match_keypoints] gives.
        - result: a scalar.

    Raises:
        TypeError: if an argument has another type, or the matcher has no such option.
        ValueError: if a shape or type does not fit, or matches name slots that do not exist or are not valid.

    Example:
        >>> a = Keypoints(torch.rand(1, 3, 2) * 8, torch.ones(1, 3, dtype=torch.bool), (8, 12))
        >>> matches = Matches(torch.tensor([[1, -1, 0]]), torch.tensor([[2, 0, -1]]))
        >>> KeypointMatchLoss(32)(torch.rand(1, 3, 32), a, torch.rand(1, 3, 32), a, matches).shape
        torch.Size([])
    """

    def __init__(
        self,
        embed_dim: int = 256,
        *,
        positive_weight: float = 0.45,
        negative_weight: float = 1.0,
        **matcher: Any,
    ) -> None:
        super().__init__()
        self.matcher = KeypointMatcher(embed_dim, **matcher)
        self.positive_weight = positive_weight
        self.negative_weight = negative_weight

    def forward(
        self,
        tokens_a: Annotated[Tensor, "B N_a E"],
        keypoints_a: Keypoints,
        tokens_b: Annotated[Tensor, "B N_b E"],
        keypoints_b: Keypoints,
        matches: Matches,
    ) -> Annotated[Tensor, ""]:
        """Computes the loss.

        Args:
            tokens_a: (B, N_a, E), one for each slot of keypoints_a.
            keypoints_a: the keypoints of one image of each pair.
            tokens_b: (B, N_b, E), one for each slot of keypoints_b.
            keypoints_b: the keypoints of the other image.
            matches: the matches between these keypoints.

        Returns:
            A scalar.
        """
        return keypoint_match_loss(
            self.matcher(tokens_a, keypoints_a, tokens_b, keypoints_b),
            keypoints_a,
            keypoints_b,
            matches,
            positive_weight=self.positive_weight,
            negative_weight=self.negative_weight,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"positive_weight={self.positive_weight}, negative_weight={self.negative_weight}"


def _check(log_assignment: Tensor, keypoints_a: Keypoints, keypoints_b: Keypoints, matches: Matches) -> None:
    check_floats(log_assignment=log_assignment)
    check_keypoints(keypoints_a=keypoints_a, keypoints_b=keypoints_b)
    check_matches(matches)
    (batch, slots_a), slots_b = keypoints_a.valid.shape, keypoints_b.valid.shape[-1]
    if log_assignment.shape != (batch, slots_a + 1, slots_b + 1):
        raise ValueError(
            "log_assignment must be (B, N_a + 1, N_b + 1), "
            f"got {log_assignment.shape=} for {keypoints_a.valid.shape=} and {keypoints_b.valid.shape=}"
        )
    for indices, slots, name in ((matches.indices, slots_b, "b"), (matches.inverse, slots_a, "a")):
        raise_where((indices < -1) | (indices >= slots), f"matches must be slots of {name}, 0 to {slots - 1}, or -1")
    among = matches.among(keypoints_a, keypoints_b)
    raise_where(
        (among.indices != matches.indices).any(dim=1) | (among.inverse != matches.inverse).any(dim=1),
        "matches must be between valid keypoints (call matches.among(keypoints_a, keypoints_b))",
    )

"""Positional contrastive learning: slices at similar positions in different volumes look alike."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kaf_layer.checks import check_floats, check_tensors, raise_where
from kaf_layer.precision import at_least_float32, without_autocast

__all__ = ["PCLLoss", "pcl_loss"]


def pcl_loss(
    embeddings: Annotated[Tensor, "B V E"],
    positions: Annotated[Tensor, "B"],
    *,
    temperature: float = 0.1,
    threshold: float = 0.1,
    gather_distributed: bool = False,
) -> Annotated[Tensor, ""]:
    """The positional contrastive loss, as a function; see [PCLLoss][kaf_layer.PCLLoss]."""
    _check(embeddings, positions, temperature, threshold)
    with without_autocast(embeddings.device):
        dtype = at_least_float32(embeddings.dtype)
        unit = F.normalize(embeddings.to(dtype), dim=-1)
        if gather_distributed and dist.is_available() and dist.is_initialized():
            unit, positions = _gather(unit, positions)
        if unit.shape[0] * unit.shape[1] == 1:
            raise ValueError(f"embeddings must be two or more (B * V) for a contrast, got {embeddings.shape=}")
        similarity = unit.flatten(0, 1) @ unit.flatten(0, 1).T / temperature
        # As floating point, because unsigned integers have no negative differences.
        position = positions.detach().to(at_least_float32(positions.dtype))
        position = position.repeat_interleave(unit.shape[1])
        itself = torch.eye(len(position), dtype=torch.bool, device=position.device)
        positive = ((position[:, None] - position).abs() < threshold) & ~itself
        # For each anchor, the mean over its positives of log(exp(s_ip) / sum of exp(s_ia) over a != i).
        count = positive.sum(dim=1)
        mean_similarity = similarity.where(positive, 0.0).sum(dim=1) / count.clamp(min=1)
        log_likelihood = mean_similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1)
        anchors = count > 0
        return -log_likelihood.where(anchors, 0.0).sum() / anchors.sum().clamp(min=1)


class PCLLoss(nn.Module):
    r"""Positional contrastive loss (Yang et al., NeurIPS 2023, Eq. 1; Zeng et al., MICCAI 2021).

    Here :math:`s_{ij}` is the cosine similarity of two embeddings, divided by the temperature. The positives P(i) of an
    anchor i are all other views and slices less than ``threshold`` away along the volume:

    .. math:: -\frac{1}{|\{i: P(i) \ne \emptyset\}|} \sum_i \frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{\exp(s_{ip})}{\sum_{a \ne i} \exp(s_{ia})}

    If no slice has a positive, as in an empty batch, it is zero. It is computed in float32 (float64 for float64
    embeddings), also under autocast. The authors' implementation multiplies it by ``temperature / 0.07``.

    Args:
        temperature: divides the cosine similarities, > 0.
        threshold: the difference of relative positions below which slices are positives, > 0.
        gather_distributed: contrasts with the embeddings of all processes of the default group, if there is
            one. Each process must have the same batch size. The result is the loss of the whole batch, and
            gradients are correct after averaging over the processes, as DDP and FSDP do.

    Shape:
        - embeddings: (B, V, E), V views of each of B slices; V may be 1.
        - positions: (B,), the slices' relative positions in their volumes, from 0 to 1. With slice numbers or
          millimetres no slice would have a positive, and nothing would be learned.
        - result: a scalar.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if a shape or type does not fit, there is only one embedding, an option is out of its range,
            embeddings are not finite, positions are outside [0, 1], or the processes' batch sizes differ. For wrong
            values, CUDA raises a device-side assertion with this message, and compiled code a RuntimeError. Neither
            makes the GPU wait.

    Example:
        >>> loss = PCLLoss(temperature=0.1, threshold=0.35)
        >>> embeddings = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])  # 2 slices, 2 views
        >>> positions = torch.tensor([0.1, 0.6])
        >>> f"{loss(embeddings, positions):.4f}"  # log(1 + 2 exp(-1 / 0.1))
        '0.0001'
    """

    def __init__(self, *, temperature: float = 0.1, threshold: float = 0.1, gather_distributed: bool = False) -> None:
        super().__init__()
        _check_options(temperature, threshold)
        self.temperature = temperature
        self.threshold = threshold
        self.gather_distributed = gather_distributed

    def forward(
        self, embeddings: Annotated[Tensor, "B V E"], positions: Annotated[Tensor, "B"]
    ) -> Annotated[Tensor, ""]:
        """Computes the loss.

        Args:
            embeddings: (B, V, E), V views of each of B slices.
            positions: (B,), the slices' relative positions in their volumes, from 0 to 1.

        Returns:
            A scalar.
        """
        return pcl_loss(
            embeddings,
            positions,
            temperature=self.temperature,
            threshold=self.threshold,
            gather_distributed=self.gather_distributed,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"temperature={self.temperature}, threshold={self.threshold}, gather_distributed={self.gather_distributed}"
        )


def _check_options(temperature: float, threshold: float) -> None:
    if not (temperature > 0 and threshold > 0):
        raise ValueError(f"temperature and threshold must be positive, got {temperature=} and {threshold=}")


def _check(embeddings: Tensor, positions: Tensor, temperature: float, threshold: float) -> None:
    _check_options(temperature, threshold)
    check_floats(embeddings=embeddings)
    check_tensors(positions=positions)
    if embeddings.ndim != 3:
        raise ValueError(
            f"embeddings must be (B, V, E), views on axis 1 (unsqueeze a single one), got {embeddings.shape=}"
        )
    if positions.shape != embeddings.shape[:1]:
        raise ValueError(f"positions must be (B,), one for each slice, got {positions.shape=} for {embeddings.shape=}")
    raise_where(~embeddings.isfinite(), "embeddings must be finite")
    raise_where(
        ~((positions >= 0) & (positions <= 1)),
        "positions must be finite and relative, from 0 to 1 (divide slice numbers by the number of slices)",
    )


def _gather(embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings and positions of all processes, in the order of their ranks.

    Gradients reach only this process's own embeddings, multiplied by the number of processes. So the
    average over the processes is the gradient of the loss, and the backward pass needs no communication.
    """
    world = dist.get_world_size()
    sizes = _all_gather(torch.full((1,), len(embeddings), device=embeddings.device))
    different = torch.cat(sizes) != len(embeddings)
    raise_where(
        different,
        f"all processes must bring the same batch size, rank {dist.get_rank()} has {len(embeddings)}",
        of="ranks",
    )
    gathered = _all_gather(embeddings.detach().contiguous())
    gathered[dist.get_rank()] = embeddings + (world - 1) * (embeddings - embeddings.detach())
    return torch.cat(gathered), torch.cat(_all_gather(positions.detach().contiguous()))


def _all_gather(tensor: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered

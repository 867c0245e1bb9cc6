"""The predictions of a trained network for volumes, and their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.protocol.results.scores import Scores, score
from examples.protocol.training.batches import gather, slices_of
from examples.protocol.volumes.stacks import Stack


@torch.no_grad()
def predict(model: nn.Module, stack: Stack, *, batch: int = 8) -> Tensor:
    """The most likely class of each pixel, (Z, H, W), in the volume's size."""
    model.eval()
    device = next(model.parameters()).device
    slices = slices_of([stack])
    batches = [gather(slices[i : i + batch], device) for i in range(0, len(slices), batch)]
    return stack.restore(torch.cat([model(b.images, b.keypoints).argmax(1).cpu() for b in batches]))


def evaluate(model: nn.Module, stacks: Sequence[Stack], *, classes: int) -> list[list[float]]:
    """The Dice of each class except the background over each whole volume; NaN for a class that it lacks."""
    return [scores.dice for scores in score_all(model, stacks, classes=classes)]


def score_all(model: nn.Module, stacks: Sequence[Stack], *, classes: int) -> list[Scores]:
    """The Dice and the distances of each whole volume."""
    pairs = ((predict(model, stack), stack.volume) for stack in tqdm(stacks, desc="test", leave=False))
    return [score(labels, volume.label, classes=classes, spacing=volume.spacing) for labels, volume in pairs]

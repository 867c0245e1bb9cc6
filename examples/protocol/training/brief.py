"""A brief training without checkpoints, for networks that are compared side by side."""

from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from torch import nn
from tqdm import tqdm

from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.batches import draw_batches, gather, slices_of
from examples.protocol.training.loop import cosine
from examples.protocol.volumes.stacks import Stack


def fit(network: nn.Module, stacks: Sequence[Stack], *, steps: int, lr: float, seed: int) -> None:
    """Trains with Dice and cross-entropy on augmented batches of 6 slices. The learning rate falls along a cosine.

    Args:
        network: maps images and keypoints to logits.
        stacks: volumes whose slices it is trained on.
        steps: the number of batches.
        lr: the learning rate that Adam starts with.
        seed: of the batches and their augmentation.
    """
    torch.manual_seed(seed)
    slices = slices_of(stacks)
    augment, criterion = Augmentation(), DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    network.train()
    batches = draw_batches(len(slices), 6, steps, seed=seed)
    for step, batch in enumerate(tqdm(batches, desc="training", unit="step", leave=False)):
        optimizer.param_groups[0]["lr"] = cosine(lr, step / steps)
        images, keypoints, labels = augment(*gather([slices[i] for i in batch], torch.device("cpu")))
        loss = criterion(network(images, keypoints), labels[:, None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

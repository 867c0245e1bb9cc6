"""Trains the UNet and the KAF-UNet for the same time on two subjects, and compares them on unseen ones.

    python examples/demo.py                                   # phantoms, about 4 minutes on 2 cores
    python examples/demo.py --data ../shared/data/sunnybrook  # any folder that data.py reads

Prints a table of Dice scores and writes outputs/demo.png.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from data import load_volumes, num_classes
from kornia.augmentation import RandomAffine
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from phantom import Volume
from torch import Tensor, nn
from tqdm import tqdm
from unet import KAFUNet, UNet

from kaf_layer import Keypoints, SIFTDetector
from kaf_layer.augmentation import KeypointAugmentation

COLOURS = plt.get_cmap("Set1").colors


@dataclass
class Slices:
    """A volume as a batch of slices (Z, 1, H, W) with labels (Z, 1, H, W) and keypoints."""

    images: Tensor
    labels: Tensor
    keypoints: Keypoints
    subject: str


def prepare(volumes: list[Volume]) -> list[Slices]:
    """Pads all slices to one size, to the right and below, and detects the keypoints of each slice, once."""
    height, width = (max(-(-volume.image.shape[axis] // 16) * 16 for volume in volumes) for axis in (1, 2))
    detector, prepared = SIFTDetector(max_keypoints=256, descriptors=False), []
    for volume in tqdm(volumes, desc="keypoints", leave=False):
        missing = (0, width - volume.image.shape[2], 0, height - volume.image.shape[1])
        images = F.pad(volume.image[:, None], missing, mode="replicate")
        labels = F.pad(volume.label[:, None], missing)
        prepared.append(Slices(images, labels, detector(images), volume.subject))
    return prepared


def train(model: nn.Module, volumes: list[Slices], *, seconds: float, batch: int, name: str) -> int:
    """Trains on random batches of augmented slices until the time is over; returns the number of steps."""
    augment = KeypointAugmentation(RandomAffine(15.0, translate=(0.1, 0.1), scale=(0.8, 1.25), p=1.0))
    slices = [(v.images[i], v.labels[i], v.keypoints[i]) for v in volumes for i in range(len(v.images))]
    optimizer = torch.optim.Adam(model.parameters())
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    start, steps, bar = time.perf_counter(), 0, tqdm(total=round(seconds), desc=name, unit="s", leave=False)
    model.train()
    while (elapsed := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - elapsed / seconds)
        images, labels, keypoints = zip(*(slices[i] for i in torch.randperm(len(slices))[:batch]), strict=True)
        batch_of = augment(torch.stack(images), Keypoints.stack(keypoints), torch.stack(labels))
        contrast = torch.empty(len(images), 1, 1, 1).uniform_(0.6, 1.5)
        loss = loss_function(model(batch_of.images * contrast, batch_of.keypoints), batch_of.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        bar.set_postfix(loss=f"{loss.item():.3f}", steps=steps)
        bar.update(min(round(elapsed), bar.total) - bar.n)
    bar.close()
    return steps


@torch.no_grad()
def predict(model: nn.Module, volume: Slices) -> Tensor:
    """The most likely class of each pixel, (Z, 1, H, W)."""
    model.eval()
    logits = [model(volume.images[i : i + 4], volume.keypoints[i : i + 4]) for i in range(0, len(volume.images), 4)]
    return torch.cat(logits).argmax(1, keepdim=True)


def dice(predictions: list[Tensor], volumes: list[Slices], classes: int) -> Tensor:
    """Dice of each class over whole volumes (slices stacked), the mean over volumes, without the background."""
    metric = DiceMetric(include_background=False, reduction="mean_batch", num_classes=classes)
    for prediction, volume in zip(predictions, volumes, strict=True):
        metric(prediction.transpose(0, 1)[None], volume.labels.transpose(0, 1)[None])
    return metric.aggregate()


def draw(volumes: list[Slices], predictions: dict[str, list[Tensor]], path: Path) -> None:
    """The slice with most foreground of the first unseen subjects: keypoints, reference, predictions."""
    rows = min(4, len(volumes))
    panels = ["keypoints", "reference", *predictions]
    figure, axes = plt.subplots(
        rows, len(panels), figsize=(2.6 * len(panels), 2.6 * rows), squeeze=False, layout="constrained"
    )
    for row, volume in enumerate(volumes[:rows]):
        z = int((volume.labels > 0).sum((1, 2, 3)).argmax())
        image, keypoints = volume.images[z, 0].numpy(), volume.keypoints[z]
        maps = [None, volume.labels, *(of_model[row] for of_model in predictions.values())]
        for axis, title, labels in zip(axes[row], panels, maps, strict=True):
            axis.imshow(image, cmap="gray", vmax=np.percentile(image, 99.5))
            axis.set_axis_off()
            axis.set_title(title if row == 0 else "")
            if labels is None:
                axis.scatter(*keypoints.positions[keypoints.valid].T.numpy(), s=6, c="yellow", linewidths=0)
                continue
            for label in labels[z].unique()[1:].tolist():
                mask = (labels[z, 0] == label).numpy()
                axis.contour(mask, levels=[0.5], colors=[COLOURS[label - 1]], linewidths=1.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of NIfTI volumes (default: the phantoms)")
    parser.add_argument("--subjects", type=int, default=10, help="in all; two are for training")
    parser.add_argument("--seconds", type=float, default=100, help="training time of each model")
    parser.add_argument("--width", type=int, default=8, help="channels of the first block")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"))
    options = parser.parse_args(arguments)

    volumes = load_volumes(options.data, limit=options.subjects)
    classes = num_classes(volumes)
    names = sorted({volume.subject for volume in volumes})
    if len(names) < 3:
        parser.error(f"two subjects to train on and one to test on are needed, got {names}")
    prepared = prepare(volumes)
    training, unseen = (
        [volume for volume in prepared if (volume.subject in names[:2]) == known] for known in (True, False)
    )

    models = {
        "UNet": lambda: UNet(1, classes, width=options.width),
        "KAF-UNet": lambda: KAFUNet(1, classes, width=options.width, embed_dim=64, depth=2),
    }
    predictions: dict[str, list[Tensor]] = {}
    print(
        f"Trained on {', '.join(names[:2])} for {options.seconds:g} s each, tested on {len(names) - 2} unseen subjects."
    )
    print(f"\n| model | parameters | steps | {' | '.join(f'Dice {c}' for c in range(1, classes))} | mean |")
    print("|---" * (classes + 3) + "|")
    for name, build in models.items():
        torch.manual_seed(options.seed)
        model = build()
        steps = train(model, training, seconds=options.seconds, batch=options.batch, name=name)
        predictions[name] = [predict(model, volume) for volume in tqdm(unseen, desc=f"{name}: test", leave=False)]
        scores = dice(predictions[name], unseen, classes)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cells = " | ".join(f"{score:.3f}" for score in [*scores.tolist(), scores.mean().item()])
        print(f"| {name} | {parameters / 1e6:.1f} M | {steps} | {cells} |")
    draw(unseen, predictions, options.output)
    print(f"\nPictures: {options.output}")


if __name__ == "__main__":
    main()

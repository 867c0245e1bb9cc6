"""The demo: trains a UNet and a KAF-UNet for the same number of steps on a task that needs context."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import numpy as np
import torch
from kornia.augmentation import RandomAffine
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from examples.protocol.options import DemoOptions
from examples.protocol.volumes.loading import load_volumes, normalise
from examples.protocol.volumes.situs import situs
from examples.protocol.volumes.volume import Volume
from examples.unet import KAFUNet, UNet
from kaf_layer import Keypoints, SIFTDetector
from kaf_layer.augmentation import KeypointAugmentation

COLOURS = plt.get_cmap("Set1")(range(9))


@dataclass
class Slices:
    """A volume as a batch of slices (Z, 1, H, W) with labels (Z, 1, H, W) and keypoints."""

    images: Tensor
    labels: Tensor
    keypoints: Keypoints
    subject: str


def synthetic(count: int) -> list[Volume]:
    """Subjects of situs.py, normalised as by load_volumes."""
    volumes = [situs(subject) for subject in range(count)]
    return [Volume(normalise(volume.image), volume.label, volume.subject) for volume in volumes]


def read(options: DemoOptions) -> list[Volume]:
    """The volumes of --data, or synthetic ones."""
    if options.data is None:
        return synthetic(options.subjects)
    return load_volumes(
        options.data,
        limit=options.subjects,
        ignore_affine=options.ignore_affine,
        orientation=options.orientation,
        window=options.window_level,
    )


def renumber(volumes: list[Volume]) -> tuple[list[Volume], list[int]]:
    """Numbers the labels without gaps, since classes that do not occur need no output; returns the old numbers too."""
    values = torch.cat([volume.label.unique() for volume in volumes]).unique()
    if values[0] > 0:
        values = F.pad(values, (1, 0))  # the background, even if it does not occur
    return [replace(v, label=torch.searchsorted(values, v.label)) for v in volumes], values.tolist()


def prepare(volumes: list[Volume]) -> list[Slices]:
    """Pads all slices to one size, on the right and at the bottom, and detects the keypoints of each slice once."""
    height, width = (max(-(-volume.image.shape[axis] // 16) * 16 for volume in volumes) for axis in (1, 2))
    detector, prepared = SIFTDetector(max_keypoints=128, descriptors=False), []
    for volume in tqdm(volumes, desc="keypoints", leave=False):
        missing = (0, width - volume.image.shape[2], 0, height - volume.image.shape[1])
        images = F.pad(volume.image[:, None], missing, mode="replicate")
        labels = F.pad(volume.label[:, None], missing)
        prepared.append(Slices(images, labels, detector(images), volume.subject))
    return prepared


def train(model: nn.Module, volumes: list[Slices], *, steps: int, batch: int, name: str) -> None:
    """Trains on random batches of augmented slices."""
    affine = RandomAffine(3.0, translate=(0.1, 0.1), scale=(0.8, 1.25), p=1.0, padding_mode="reflection")
    augment = KeypointAugmentation(affine)
    slices = [(v.images[i], v.labels[i], v.keypoints[i]) for v in volumes for i in range(len(v.images))]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    model.train()
    for _ in (bar := tqdm(range(steps), desc=name, unit="step", leave=False)):
        images, labels, keypoints = zip(*(slices[i] for i in torch.randperm(len(slices))[:batch]), strict=True)
        batch_of = augment(torch.stack(images), Keypoints.stack(keypoints), torch.stack(labels))
        contrast = torch.empty(len(images), 1, 1, 1).uniform_(0.6, 1.5)
        loss = loss_function(model(batch_of.images * contrast, batch_of.keypoints), batch_of.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def predict(model: nn.Module, volume: Slices) -> Tensor:
    """The most likely class of each pixel, (Z, 1, H, W)."""
    model.eval()
    logits = [model(volume.images[i : i + 4], volume.keypoints[i : i + 4]) for i in range(0, len(volume.images), 4)]
    return torch.cat(logits).argmax(1, keepdim=True)


def dice(predictions: list[Tensor], volumes: list[Slices], classes: int) -> Tensor:
    """The Dice of each class except the background: the mean over the whole volumes that have the class."""
    metric = DiceMetric(include_background=False, reduction="none", num_classes=classes)
    for prediction, volume in zip(predictions, volumes, strict=True):
        metric(prediction.transpose(0, 1)[None], volume.labels.transpose(0, 1)[None])
    return metric.aggregate().nanmean(0)


def draw(volumes: list[Slices], predictions: dict[str, list[Tensor]], path: Path) -> None:
    """Draws the slice with the most foreground of the first unseen subjects: keypoints, reference, predictions."""
    rows = min(2, len(volumes))
    panels = ["keypoints", "reference", *predictions]
    width, height = 2.0, 2.0 * volumes[0].images.shape[2] / volumes[0].images.shape[3]
    figure, axes = plt.subplots(
        rows, len(panels), figsize=(width * len(panels), height * rows), squeeze=False, layout="constrained"
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
            for label in filter(None, labels[z].unique().tolist()):
                mask = (labels[z, 0] == label).numpy()
                axis.contour(mask, levels=[0.5], colors=[COLOURS[(label - 1) % len(COLOURS)]], linewidths=1.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def spread(values: list[float]) -> str:
    """The mean of values and, if there are several, their standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def demonstrate(options: DemoOptions) -> None:
    """Prints a table of Dice scores and writes a picture."""
    volumes, values = renumber(read(options))
    classes = len(values)
    if classes < 2:
        raise ValueError(f"--data {options.data} has only background labels, so there is nothing to learn")
    names = sorted({volume.subject for volume in volumes})
    if len(names) < 2:
        raise ValueError(f"at least one subject to train on and one to test on are needed, got {names}")
    prepared, known = prepare(volumes), names[: len(names) // 2]
    training, unseen = ([v for v in prepared if (v.subject in known) == wanted] for wanted in (True, False))

    models = {
        "UNet": lambda: UNet(1, classes, width=options.width, layers=[None] * 2),
        "KAF-UNet": lambda: KAFUNet(1, classes, width=options.width, levels=3, embed_dim=64, depth=2),
    }
    predictions: dict[str, list[Tensor]] = {}
    print(f"{options.steps} steps on {len(known)} subjects, tested on {len(names) - len(known)} others, seeds", end=" ")
    print(f"{', '.join(map(str, options.seeds))}; mean ± deviation over the seeds.\n")
    print(f"| model | parameters | seconds | {' | '.join(f'Dice {c}' for c in values[1:])} | mean |")
    print("|---" * (classes + 3) + "|")
    for name, build in models.items():
        scores, start = [], time.perf_counter()
        for seed in options.seeds:
            torch.manual_seed(seed)
            model = build()
            train(model, training, steps=options.steps, batch=options.batch, name=f"{name}, seed {seed}")
            predictions[name] = [predict(model, volume) for volume in unseen]
            of_class = dice(predictions[name], unseen, classes)
            scores.append([*of_class.tolist(), of_class.nanmean().item()])
        seconds = (time.perf_counter() - start) / len(options.seeds)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cells = " | ".join(spread(list(column)) for column in zip(*scores, strict=True))
        print(f"| {name} | {parameters / 1e6:.1f} M | {seconds:.0f} | {cells} |", flush=True)
    draw(unseen, predictions, options.output)
    print(f"\nPictures of seed {options.seeds[-1]}: {options.output}")

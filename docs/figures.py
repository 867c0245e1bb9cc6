"""Draws the figures of the pages into docs/images.

    python -m docs.figures                                   # on synthetic images
    python -m docs.figures --data ../shared/data/sunnybrook  # a slice of Sunnybrook too, by the weights of the bundle

The network behind concept.png and attention.png is trained on the task of ``benchmarks/context/task.py``: minutes on
one core.
"""

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.context.task import IGNORED, Task, draw_task
from examples.protocol.volumes.phantom import phantom
from examples.unet import KAFUNet
from kaf_layer import Keypoints, SIFTDetector, match_keypoints, record_attention, sample_keypoints
from kaf_layer.plotting import (
    draw_attention,
    draw_image,
    draw_keypoints,
    draw_labels,
    draw_matches,
    draw_similarity,
    self_similarity,
)

FOLDER = Path(__file__).parent / "images"
BUNDLE = Path(__file__).parents[1] / "examples" / "bundle"
LAYER = 0  # of two: the one on the image's own resolution, where the distance is bridged
HEAD = 0, 2  # the block and head of it that look at the marker most
STYLE = {"font.size": 10, "axes.titlesize": 10.5, "savefig.dpi": 150}


def train(steps: int = 250, images: int = 1000) -> KAFUNet:
    """A small KAF-UNet that has learned to attend to the distant marker."""
    torch.manual_seed(0)
    network = KAFUNet(1, 2, width=8, levels=3, embed_dim=64, depth=2)
    task = draw_task(images, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = task[torch.randint(images, (8,))]
        loss = F.cross_entropy(network(batch.images, batch.keypoints), batch.labels, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return network.eval()


@torch.no_grad()
def accuracy(network: KAFUNet, task: Task) -> float:
    """The share of images whose target is classified correctly."""
    right = (network(task.images, task.keypoints).argmax(1) == task.labels) & (task.labels != IGNORED)
    return (right.sum((1, 2)) > (task.labels != IGNORED).sum((1, 2)) / 2).float().mean().item()


def nearest(keypoints: Keypoints, position: Tensor) -> int:
    """The slot of the keypoint of one sample that is nearest to a position, (x, y)."""
    distance = (keypoints.positions - position).norm(dim=-1)
    return int(distance.masked_fill(~keypoints.valid, torch.inf).argmin())


def target_slot(task: Task) -> int:
    """The keypoint next to the target of a single image."""
    return nearest(task.keypoints[0], (task.labels[0] != IGNORED).nonzero().float().mean(0).flip(0))


@torch.no_grad()
def draw_concept(network: KAFUNet, task: Task) -> Figure:
    """What a layer does with one image, step by step; all that is drawn is computed by the trained network."""
    image, keypoints, query = task.images[0, 0], task.keypoints[0], target_slot(task)
    seen: dict[str, Any] = {}
    layer = network.encoder.layers[str(LAYER)]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(features=args[0][0])),
        layer.register_forward_hook(lambda _, __, output: seen.update(output=output)),
    ]
    with record_attention(network) as recorded:
        network(task.images, task.keypoints)
    for hook in hooks:
        hook.remove()
    weights = recorded[f"encoder.layers.{LAYER}.transformer"]
    features, fused, tokens = seen["features"], seen["output"].features[0], seen["output"].tokens[0]
    diffused = fused[len(features) :]

    figure = Figure(figsize=(7.4, 5.2), layout="constrained")
    (a, b, c), (d, e, f) = figure.subplots(2, 3)
    draw_keypoints(a, image, keypoints)
    a.set_title("1  Detect keypoints")
    draw_channel(b, features, image)
    draw_keypoints(b, None, keypoints)
    b.set_title("2a  Sample the map")
    at = sample_keypoints(features[None], task.keypoints)[0, keypoints.valid]
    draw_tokens(c, at, tokens[keypoints.valid])
    c.set_title("2b  Vectors to tokens")
    draw_links(d, image, keypoints, weights[0], query)
    d.set_title("3  Attend to all others")
    change = (diffused - diffused.flatten(1).median(1).values[:, None, None]).norm(dim=0)
    draw_channel(e, change[None], image, cmap="magma")
    e.set_title("4  Diffuse into patches")
    draw_stack(f, [*features[:4], *diffused[:4]])
    f.set_title("5  Fuse with the map")
    return figure


def draw_channel(axes: Any, features: Tensor, image: Tensor, **style: Any) -> None:
    """The mean of a map's channels, in pixels of the image."""
    height, width = image.shape
    draw_image(axes, features.mean(0), extent=(-0.5, width - 0.5, height - 0.5, -0.5), **{"cmap": "viridis"} | style)


def draw_tokens(axes: Any, sampled: Tensor, tokens: Tensor) -> None:
    """Vectors sampled from the map and the tokens, a row for each keypoint."""
    axes.set_axis_off()
    axes.set_aspect("auto")
    for values, left, right in ((sampled, 0.0, 0.2), (tokens, 0.35, 1.0)):
        inset = axes.inset_axes((left, 0.1, right - left, 0.9))
        inset.imshow((values - values.mean(0)) / values.std(0), aspect="auto", cmap="coolwarm", vmin=-2.5, vmax=2.5)
        inset.set(xticks=[], yticks=[])
        inset.set_xlabel(f"{values.shape[1]} channels", fontsize=8)
        inset.set_ylabel(f"{len(values)} keypoints" if not left else "", fontsize=8)
    axes.annotate("", (0.34, 0.55), (0.21, 0.55), xycoords="axes fraction", arrowprops={"arrowstyle": "->"})


def draw_links(axes: Any, image: Tensor, keypoints: Keypoints, weights: Tensor, query: int) -> None:
    """Attention as lines from one keypoint to all others, as wide as their weight."""
    draw_attention(axes, image, keypoints, weights, query)
    row, start = weights.mean((0, 1))[query], keypoints.positions[query]
    for end, share in zip(keypoints.positions[keypoints.valid], row[keypoints.valid] / row.max(), strict=True):
        axes.plot(*torch.stack([start, end]).T.numpy(), color="orange", linewidth=3 * share.item(), alpha=0.6, zorder=1)


def draw_stack(axes: Any, channels: list[Tensor]) -> None:
    """Channels as cards, one behind the other."""
    axes.set_axis_off()
    for i, channel in enumerate(channels):
        half = len(channels) // 2
        left = 0.07 * (i % half) + (0.5 if i >= half else 0.0)
        card = axes.inset_axes((left, 0.5 - 0.07 * (i % half), 0.3, 0.4), zorder=i)
        card.imshow(channel, cmap="viridis" if i < half else "magma")
        card.set(xticks=[], yticks=[])
        for side in card.spines.values():
            side.set(color="white", linewidth=1.5)
    axes.text(0.25, 0.12, "map", ha="center")
    axes.text(0.76, 0.12, "diffused map", ha="center")


@torch.no_grad()
def draw_reading(network: KAFUNet, task: Task) -> Figure:
    """Attention of the target by one head, in two images of each class."""
    kinds = task.labels.flatten(1).amax(1)
    task = task[torch.cat([(kinds == kind).nonzero()[:2, 0] for kind in (0, 1)])]
    figure = Figure(figsize=(8, 2.3), layout="constrained")
    axes = figure.subplots(1, 4)
    for i, axis in enumerate(axes):
        one = task[i : i + 1]
        with record_attention(network) as recorded:
            kind = network(one.images, one.keypoints).argmax(1)[one.labels != IGNORED].mode().values.item()
        weights = recorded[f"encoder.layers.{LAYER}.transformer"]
        dots = draw_attention(axis, one.images[0, 0], one.keypoints[0], weights[0][HEAD], target_slot(one), vmax=0.5)
        axis.set_title(f"class {int(one.labels.max())}, found {kind}")
    figure.colorbar(dots, ax=axes, label="attention weight", shrink=0.8)
    return figure


def draw_phantoms() -> dict[str, Figure]:
    """Keypoints, matches and self-similarity, on synthetic cardiac MRI."""
    volumes = [phantom(subject).image for subject in range(4)]
    slices = torch.stack([image[z] for image in volumes for z in (3, 4)])[:, None]
    keypoints = SIFTDetector(max_keypoints=128, contrast_threshold=0.02)(slices)
    found = Figure(figsize=(8, 2.4), layout="constrained")
    for axis, sample in zip(found.subplots(1, 4), range(0, 8, 2), strict=True):
        axis.set_title(f"{draw_keypoints(axis, slices[sample, 0], keypoints[sample], s=7)} keypoints")
    matched = Figure(figsize=(8, 2.4), layout="constrained")
    matches = match_keypoints(keypoints[::2], keypoints[1::2])
    for i, axis in enumerate(matched.subplots(1, 2)):
        a, b = 2 * i, 2 * i + 1
        pair = type(matches)(matches.indices[i : i + 1], matches.inverse[i : i + 1])
        count = draw_matches(axis, slices[a, 0], keypoints[a], slices[b, 0], keypoints[b], pair)
        axis.set_title(f"{count} matches")
    similar = Figure(figsize=(8, 2.4), layout="constrained")
    edges = F.unfold(slices, 9, padding=4).unflatten(2, slices.shape[2:])  # the 81 values around each pixel
    edges = edges - edges.mean(1, keepdim=True)
    for axis, sample in zip(similar.subplots(1, 4), range(0, 8, 2), strict=True):
        x, y = keypoints.positions[sample, nearest(keypoints[sample], torch.tensor([56.0, 64.0]))].tolist()
        similarity = self_similarity(edges[sample], (x, y), keypoints.image_size)
        draw_similarity(axis, slices[sample, 0], similarity, (x, y))
    return {"keypoints": found, "matches": matched, "similarity": similar}


def load_bundle() -> tuple[Any, Any, dict[str, Any]]:
    """The bundle's network and the UNet without layers, with their weights, and how they were trained and tested."""
    from monai.bundle import ConfigParser

    config = ConfigParser()
    config.read_config(BUNDLE / "configs" / "inference.json")
    network = config.get_parsed_content("network_def").eval()
    unet = deepcopy(network.backbone)
    for each, name in ((network, "model"), (unet, "unet")):
        each.load_state_dict(torch.load(BUNDLE / "models" / f"{name}.pt", weights_only=True))
    return network, unet, json.loads((BUNDLE / "models" / "model.json").read_text())


@torch.no_grad()
def draw_sunnybrook(data: Path) -> dict[str, Figure]:
    """A slice of the volume whose gain by the layers is nearest to the mean gain: predictions, and attention."""
    from examples.bundle.train import load_slices

    network, unet, about = load_bundle()
    gains = [a[1] - b[1] for a, b in zip(about["model"]["scores"], about["unet"]["scores"], strict=True)]
    stacks = [stack for stack in load_slices(data, network.detector) if stack.volume.subject in about["test"]]
    chosen = min(range(len(gains)), key=lambda i: abs(gains[i] - mean(gains)))
    stack = stacks[chosen]
    z = int((stack.labels > 0).sum((1, 2)).argmax())
    scores = [about[name]["scores"][chosen][1] for name in ("unet", "model")]
    print(f"{stack.volume.subject}, slice {z}; Dice of the volume: UNet {scores[0]:.3f}, with layers {scores[1]:.3f}")

    image, reference = stack.images[z : z + 1], stack.labels[z]
    keypoints = network.detector(image)
    with record_attention(network) as recorded:
        logits = network(image)
    # The stacks have x first; pictures have y first.
    shown, style = image[0, 0].mT, {"vmax": float(image.quantile(0.98))}
    upright = replace(keypoints[0], positions=keypoints.positions[0].flip(-1))
    labels = {"UNet": unet(image).argmax(1)[0], "UNet with KAF layers": logits.argmax(1)[0], "reference": reference}
    slices, attention = (Figure(figsize=(width, 2.3), layout="constrained") for width in (8, 5))
    first, *others = slices.subplots(1, 4)
    draw_image(first, shown, **style)
    draw_keypoints(first, None, upright, s=14)
    first.set_title("keypoints")
    for axis, (title, label) in zip(others, labels.items(), strict=True):
        draw_image(axis, shown, **style)
        draw_labels(axis, None, label.mT, linewidths=1.6)
        axis.set_title(title)
    query = nearest(upright, reference.mT.nonzero().float().mean(0).flip(0))
    axes = attention.subplots(1, len(recorded))
    for axis, weights, title in zip(axes, recorded.values(), ("first layer", "second layer"), strict=True):
        dots = draw_attention(axis, shown, upright, weights[0], query)
        attention.colorbar(dots, ax=axis, shrink=0.85)
        axis.set_title(title)
    return {"sunnybrook": slices, "attention-sunnybrook": attention}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, draws and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of Sunnybrook")
    parser.add_argument("--only", choices=("sunnybrook",), help="draw only the slice of Sunnybrook")
    options = parser.parse_args(arguments)
    if options.data:
        with rc_context(STYLE):
            for name, figure in draw_sunnybrook(options.data).items():
                save(name, figure)
    if options.only:
        return
    network = train()
    task = draw_task(60, seed=1)
    print(f"accuracy on {len(task.images)} unseen images: {accuracy(network, task):.3f}")
    far = task[task.distances > 45]
    with rc_context(STYLE):
        figures = {"concept": draw_concept(network, far[:1]), "attention": draw_reading(network, far)}
        figures |= draw_phantoms()
        for name, figure in figures.items():
            save(name, figure)


def save(name: str, figure: Figure) -> None:
    """Writes a figure beside the pages."""
    figure.savefig(FOLDER / f"{name}.png", bbox_inches="tight", pad_inches=0.05)
    print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()

"""Contact sheets of volumes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.protocol.volumes.volume import Volume


def plot(volumes: Sequence[Volume], path: Path, *, columns: int = 6) -> None:
    """Draws a contact sheet: a row of slices for each volume, with the contours of the labels."""
    figure = Figure(figsize=(2 * columns, 2.4 * len(volumes)), layout="tight")
    axes = figure.subplots(len(volumes), columns, squeeze=False)
    for row, volume in zip(axes, volumes, strict=True):
        row[0].set_title(volume.subject, fontsize=8)
        for axis, z in zip(row, np.linspace(0, len(volume.image) - 1, columns).round().astype(int), strict=True):
            image, label = volume.image[z].numpy(), volume.label[z].numpy()
            axis.imshow(image, cmap="gray", vmax=np.quantile(image, 0.99))
            for value, colour in enumerate(("cyan", "yellow", "red"), start=1):
                if (label == value).any():
                    axis.contour(label == value, [0.5], colors=colour, linewidths=0.6)
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")

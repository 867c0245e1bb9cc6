"""Lists the volumes of a folder: their sizes, voxel spacings and numbers of voxels by class.

python -m examples.protocol.data ../shared/data/sunnybrook
"""

from collections.abc import Sequence

from examples.protocol.options import DataOptions, console, parse


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(DataOptions, arguments, __doc__)
    from examples.protocol.volumes.loading import load_volumes, num_classes

    volumes = load_volumes(
        options.path,
        limit=options.limit,
        ignore_affine=options.ignore_affine,
        orientation=options.orientation,
        window=options.window_level,
    )
    for volume in volumes:
        counts = volume.label.flatten().bincount().tolist()
        spacing = " x ".join(f"{side:.3g}" for side in volume.spacing)
        print(f"{volume.subject:24} {tuple(volume.image.shape)}, {spacing} mm, voxels by class {counts}")
    print(f"{len(volumes)} volumes, {num_classes(volumes)} classes")


if __name__ == "__main__":
    console.run(main)

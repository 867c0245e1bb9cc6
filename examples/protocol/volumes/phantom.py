"""The default data set: synthetic cardiac short-axis MRI with labels, where a number determines each subject.

A subject is painted tissue by tissue, from the lung to the papillary muscles, on a warped grid in millimetres. It is
then acquired as by a scanner, with thick slices, the sensitivity of a coil, Rician noise and whole grey levels. The
labels are those of ACDC, with contours as experts draw them: smooth, with papillary muscles and trabeculae inside the
cavities.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from examples.protocol.volumes.volume import Array, Volume

LABELS = ("background", "right ventricle", "myocardium", "left ventricle")
THIN = (-0.3, 0.0, 0.3)  # a slice is the mean of thin ones: partial volume through the plane, and a gap


def phantom(subject: int, *, size: tuple[int, int] = (128, 112), slices: int = 10) -> Volume:
    """The volume of one subject, which its number determines.

    Args:
        subject: 0 or more. Subjects differ in anatomy, position, contrast, gain and field of view.
        size: (H, W). H covers about 20 cm.
        slices: the number of slices, from base to apex.
    """
    scene = Scene(subject, size, slices)
    heart = Heart(scene)
    wall = paint_chest(scene)
    paint_abdomen(scene)
    paint_heart(scene, heart, wall)
    label = heart.labels()[len(THIN) // 2 :: len(THIN)]
    affine = np.diag([scene.spacing, scene.spacing, scene.thickness, 1.0])
    return Volume(torch.from_numpy(acquire(scene)), torch.from_numpy(label), f"phantom-{subject:03d}", affine=affine)


class Scene:
    """The canvas (Z, H, W) of one subject and the positions of its pixels, in mm: x to the right, y down."""

    def __init__(self, subject: int, size: tuple[int, int], slices: int) -> None:
        self.rng = np.random.default_rng(subject)
        self.spacing = self.draw(180, 225) / size[0]
        height = self.draw(75, 95)
        z, self.thickness = np.add.outer(np.arange(slices), THIN).ravel() * height / slices, height / slices
        y, x = ((np.arange(n) - (n - 1) / 2) * self.spacing for n in size)
        self.axes, self.image = (z, y, x), np.zeros((len(z), *size))
        self.level = (z / z.max()).clip(0)[:, None, None]  # 0 at the base, 1 at the apex
        # Nothing in a body is an ellipse, and no breath is held twice in the same position.
        self.x, self.y = (
            axis + 2.5 * self.noise(30, 60) + 0.3 * self.noise(9, 30) + np.repeat(breath, len(THIN))[:, None, None]
            for axis, breath in zip((x, y[:, None]), self.rng.normal(0, 1.2, (2, slices)), strict=True)
        )
        self.muscle, self.fat = self.draw(0.2, 0.45), self.draw(0.8, 1.3)  # blood is 1

    def draw(self, low: float, high: float) -> float:
        """Draws a number that differs between subjects."""
        return float(self.rng.uniform(low, high))

    def noise(self, scale: float, depth: float = 12) -> Array:
        """Smooth noise (Z, H, W) of unit variance: bumps of random height, ``scale`` mm apart in the plane."""
        bumps = []
        for axis, step in zip(self.axes, (depth, scale, scale), strict=True):
            knots = np.arange(axis.min() - 2 * step, axis.max() + 2 * step, step)
            bump = np.exp(-(((axis[:, None] - knots) / step) ** 2))
            bumps.append(bump / np.sqrt((bump**2).sum(axis=1, keepdims=True)))
        heights = self.rng.standard_normal([bump.shape[1] for bump in bumps])
        return np.einsum("kji,zk,yj,xi->zyx", heights, *bumps, optimize=True)

    def ellipse(self, x: Array | float, y: Array | float, a: Array | float, b: Array | float, turn: float = 0) -> Array:
        """The depth of each pixel inside an ellipse, in mm, which is negative outside."""
        dx, dy = self.x - x, self.y - y
        u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        return (1 - np.hypot(u / a, v / b)) * np.minimum(a, b)

    def paint(self, depth: Array, signal: Array | float, *, rim: float = 0) -> None:
        """Paints with a soft edge where ``depth``, in mm, is positive. A dark rim shows where water meets fat."""
        if rim:
            self.paint(depth + rim, 0.08)
        self.image += np.clip(depth / self.spacing + 0.5, 0, 1) * (signal - self.image)


def paint_chest(scene: Scene) -> Array:
    """Paints lung, vessels and the chest wall (muscle with ribs, under fat); returns the depth inside the wall."""
    scene.paint(np.ones_like(scene.image), scene.draw(0.04, 0.12) * (1 + 0.4 * scene.noise(5)))
    vessels = np.minimum(1.2 - 10 * abs(scene.noise(12, 20)), 4 * scene.noise(8, 16) - 2)
    scene.paint(vessels, scene.draw(0.4, 0.8))

    turn = scene.draw(-1.1, -0.35)
    outwards = scene.x * np.sin(turn) - scene.y * np.cos(turn)
    along = scene.x * np.cos(turn) + scene.y * np.sin(turn)
    wall = outwards + (along - scene.draw(-15, 15)) ** 2 / scene.draw(300, 700)
    wall = wall - scene.draw(50, 64) + scene.draw(15, 28) * scene.level**2
    scene.paint(wall, scene.muscle * (1 + 0.2 * scene.noise(4)), rim=1)
    apart = scene.draw(22, 30)
    rib = (along + scene.draw(0, 30) + 12 * scene.level) % apart - apart / 2
    scene.paint(3.5 - np.hypot(0.6 * rib, wall - 5), 0.6 * scene.fat * (1 + 0.2 * scene.noise(4)), rim=1.5)
    fat = wall - scene.draw(9, 13) - scene.noise(20, 40)
    streaks = np.clip(1 - 5 * abs(scene.noise(12, 25)), 0, 1)
    scene.paint(fat, scene.fat * (1 + 0.1 * scene.noise(6) - 0.4 * streaks), rim=1)
    scene.paint(fat - scene.draw(10, 25), 0.02)  # air
    return wall


def paint_abdomen(scene: Scene) -> None:
    """Paints spine and aorta behind the heart; fat, liver, stomach and bowel under the diaphragm."""
    x, y = scene.draw(42, 60), scene.draw(35, 55)
    scene.paint(scene.ellipse(x + 24, y + 20, 22, 18), 0.5 * scene.fat * (1 + 0.25 * scene.noise(4)), rim=3)
    scene.paint(scene.ellipse(x, y, 11, 11), 0.9 + 0.08 * scene.noise(6), rim=1.5)

    dome = scene.draw(30, 42) - scene.draw(0, 10) * scene.level + (scene.x + scene.draw(-10, 30)) ** 2 / 500
    under = scene.y - dome
    scene.paint(under, 0.75 * scene.fat * (1 + 0.15 * scene.noise(5)), rim=1)
    loops = 7 * scene.noise(12, 40) - 2
    scene.paint(np.minimum(loops, under - 3), scene.muscle * (1 + 0.3 * scene.noise(5)), rim=1.2)
    scene.paint(np.minimum(loops - 4, under - 6), scene.draw(0.0, 1.0))

    edge = scene.draw(-5, 15) - scene.draw(0, 40) * scene.level + 8 * scene.noise(25, 60)
    liver = np.minimum(under - 1.5, edge - scene.x - 0.5 * scene.y + 20)
    scene.paint(liver, scene.draw(0.3, 0.5) * (1 + 0.08 * scene.noise(4)), rim=1.2)
    scene.paint(np.minimum(liver - 3, 1 - 8 * abs(scene.noise(14, 20))), scene.draw(0.3, 0.8))
    x, y = edge.mean() + scene.draw(25, 35), scene.draw(62, 78)
    stomach = scene.ellipse(x, y, scene.draw(15, 24), scene.draw(12, 20))
    scene.paint(np.minimum(stomach, under - 2), scene.draw(0.2, 0.5) * (1 + 0.3 * scene.noise(6)), rim=1.5)


class Heart:
    """The shape of a heart: depths (Z, H, W) below the surfaces of its chambers, in mm, negative outside."""

    def __init__(self, scene: Scene) -> None:
        draw, level = scene.draw, scene.level
        self.x, self.y = draw(-8, 16) + draw(0, 12) * level, draw(-14, 8) + draw(-8, 8) * level
        turn, radius = draw(-0.5, 0.5), draw(26, 37)
        self.septum = np.pi + turn  # the direction of the right ventricle, from the left one
        self.outer = radius * np.sqrt(1 - (0.9 * level) ** draw(2.2, 3.5))  # a bullet

        rho, angle = np.hypot(scene.x - self.x, scene.y - self.y), np.arctan2(scene.y - self.y, scene.x - self.x)
        oval = 1 + draw(0, 0.08) * np.cos(2 * (angle - draw(0, np.pi))) + 0.02 * np.cos(3 * (angle - draw(0, np.pi)))
        wall = draw(6, 16) * (1 + draw(-0.2, 0.35) * np.cos(angle - self.septum)) * (1 - 0.3 * level**2)
        infarct = np.cos(angle - draw(0, 2 * np.pi)).clip(0) ** 3
        wall = np.maximum(wall * (1 - draw(0, 0.4) * infarct), 5)
        self.left = self.outer * oval - rho
        self.cavity = np.maximum(self.left - wall, 0.25 * self.outer - rho)
        self.inner = self.outer - wall.mean()

        reach = radius * draw(0.85, 1.1) * np.clip(1.08 - (level / draw(0.85, 1.1)) ** 3, 0.01, 1)
        centre = self.beside(draw(0.6, 0.8) * self.outer, 0.3 * (1 - level))
        self.bulge = scene.ellipse(*centre, reach, reach * draw(1.05, 1.25), turn)
        self.right = np.minimum(self.bulge, -self.left)  # wrapped around the left ventricle

        ends = 20 * (draw(0.1, 0.35) - level)
        self.atrium = np.minimum(scene.ellipse(*self.beside(1.5 * radius, -0.75), 20, 16, turn), ends)
        self.trunk = np.minimum(scene.ellipse(*self.beside(1.55 * radius, 0.9), 13, 12), ends + 3)

    def beside(self, distance: Array | float, direction: float) -> tuple[Array, Array]:
        """A place at a distance from the axis of the left ventricle; direction 0 is that of the septum."""
        angle = self.septum + direction
        return self.x + distance * np.cos(angle), self.y + distance * np.sin(angle)

    def labels(self) -> NDArray[np.int64]:
        """The labels, as numbers of ``LABELS``."""
        return np.select([self.cavity > 0, self.left > 0, self.right > 0], [3, 2, 1], 0)


def paint_heart(scene: Scene, heart: Heart, wall: Array) -> None:
    """Paints the ventricles and, at the base, the right atrium and the pulmonary trunk, in fat up to the chest wall."""
    vessels = np.maximum(heart.atrium, heart.trunk)
    whole = np.maximum(np.maximum(heart.bulge + 2.5, heart.left), vessels + 1)
    pad = np.minimum(whole + 22, wall + 12)  # near the heart and near the chest wall
    fat = np.minimum(np.maximum(pad, whole + 2) + 5 * scene.noise(15, 40), -wall)
    muscle = scene.muscle * (1 + 0.08 * scene.noise(5) + 0.06 * scene.noise(2.5))
    blood = 1 + 0.08 * scene.noise(6) + 0.05 * scene.noise(3)
    trabeculae = np.minimum((0.6 + 2 * scene.level) * scene.noise(3, 20), 0)

    scene.paint(np.maximum(fat, whole + 1), 0.75 * scene.fat * (1 + 0.1 * scene.noise(5)), rim=1)
    scene.paint(whole, muscle, rim=1)
    scene.paint(vessels, blood)
    scene.paint(heart.right + trabeculae * (heart.bulge < 8), scene.draw(0.8, 1) * blood)
    scene.paint(heart.left, muscle)
    scene.paint(heart.cavity + np.maximum(trabeculae, -3), blood)
    for direction in (np.pi + 0.9, np.pi - 1.2):
        thick = scene.draw(4, 7) * np.clip(1 - (2.2 * (scene.level - scene.draw(0.4, 0.6))) ** 2, 0.01, 1)
        distance = np.maximum(heart.inner - scene.draw(0.5, 1.2) * thick, 0)
        place = heart.beside(distance, direction + scene.draw(-0.3, 0.3))
        scene.paint(scene.ellipse(*place, thick, thick), muscle)  # a papillary muscle


def acquire(scene: Scene) -> NDArray[np.float32]:
    """The image of a scanner: thick slices, the sensitivity of a surface coil, Rician noise, and a gain."""
    thick = scene.image.reshape(-1, len(THIN), *scene.image.shape[1:]).mean(axis=1)
    coil = -scene.draw(0.001, 0.005) * (scene.x + scene.y) + scene.draw(0.05, 0.15) * scene.noise(60, 200)
    signal = thick * np.exp(coil[len(THIN) // 2 :: len(THIN)])
    noise = scene.rng.normal(0, scene.draw(0.02, 0.06), (2, *signal.shape))
    magnitude = np.hypot(signal + noise[0], noise[1])
    # Scanners store whole numbers; here they also hide the last bits in which computers differ.
    return np.round(magnitude * scene.draw(150, 600)).astype(np.float32)

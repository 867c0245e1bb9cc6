"""The names that options take. This file and its neighbours import nothing that is slow to load, such as torch."""

import argparse
from typing import Literal, NamedTuple

Fusion = Literal["concat", "add"]
Position = Literal["both", "rotary", "absolute", "none"]

MODELS = {
    "unet": "UNet",
    "unet-c2": "UNet (c2)",
    "fcn": "FCN",
    "kaf-fcn": "KAF-FCN",
    "kaf-unet": "KAF-UNet",
    "swin-unet": "Swin-Unet",
    "swin-unetr": "SwinUNETR",
}
VOLUMETRIC = ("unet", "unet-c2", "kaf-unet", "swin-unetr")  # with --spatial-dims 3

LEARNT = ("disk", "dedode", "aliked", "keynet", "superpoint")  # detectors with weights, from --detector-weights
DETECTORS = ("sift", "grid", "none", *LEARNT)

OPTIMIZERS = ("sgd", "adam")
LOSSES = {  # the weight of the Dice loss beside cross-entropy
    "ce": 0.0,
    "dice_ce": 1.0,
}


class Method(NamedTuple):
    """A way to pretrain an encoder, whose code is in ``methods/``."""

    title: str
    temperature: float = 0.1  # the one of the method's paper, where it has one
    weights: tuple[float, float, float] | None = None  # of the parts of Eq. 3, if the method fixes them


METHODS = {
    "kaf": Method("KAF"),
    "pcl": Method("PCL", weights=(1.0, 0.0, 0.0)),
    "simclr": Method("SimCLR"),
    "rotation": Method("Rotation"),
    "pirl": Method("PIRL", temperature=0.07),
    "glcl-global": Method("GLCL-global"),
    "glcl": Method("GLCL-full"),
    "caid": Method("CAiD"),
    "ssl": Method("inpainting, rotation and contrast"),
}

DIRECTIONS = (("L", "R"), ("P", "A"), ("I", "S"))
STORED = "stored"  # the orientation that leaves every volume as it is in its file


def axes(text: str) -> str:
    """Checks the value of ``--orientation``."""
    if text == STORED or (len(text) == 3 and all(sum(c in pair for c in text) == 1 for pair in DIRECTIONS)):
        return text
    raise argparse.ArgumentTypeError(f'must be three letters such as RAS or LPS, or "{STORED}", got {text!r}')

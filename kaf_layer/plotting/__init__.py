"""Draws keypoints, matches, attention, self-similarity and labels on matplotlib axes (needs the extra ``plot``).

Each function draws on axes that the caller owns, so that figures are laid out, titled and saved as usual. Its arguments
are the axes, the image, and then what is drawn on the image. Images and maps are tensors without a batch axis, on any
device. matplotlib is loaded when something is drawn, not when this module is imported.
"""

from kaf_layer.plotting.attention import draw_attention
from kaf_layer.plotting.image import COLORS, draw_image, draw_labels
from kaf_layer.plotting.keypoints import draw_keypoints, draw_matches
from kaf_layer.plotting.maps import draw_similarity, self_similarity

__all__ = [
    "COLORS",
    "draw_attention",
    "draw_image",
    "draw_keypoints",
    "draw_labels",
    "draw_matches",
    "draw_similarity",
    "self_similarity",
]

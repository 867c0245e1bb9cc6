"""Working with other people's weights and networks."""

from kaf_layer.interop.attach import attach
from kaf_layer.interop.authors import AuthorsKeys, load_authors_state_dict
from kaf_layer.interop.backbone import KAFBackbone
from kaf_layer.interop.forms import TokenGrid
from kaf_layer.interop.kornia import keypoints_from_lafs, to_lafs

__all__ = [
    "AuthorsKeys",
    "KAFBackbone",
    "TokenGrid",
    "attach",
    "keypoints_from_lafs",
    "load_authors_state_dict",
    "to_lafs",
]

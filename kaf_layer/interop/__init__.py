"""Working with other people's weights and networks."""

from kaf_layer.interop.attach import KAFBackbone, attach
from kaf_layer.interop.authors import AuthorsKeys, load_authors_state_dict

__all__ = ["AuthorsKeys", "KAFBackbone", "attach", "load_authors_state_dict"]

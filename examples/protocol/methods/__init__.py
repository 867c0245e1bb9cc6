"""The ways to pretrain an encoder, by the names in ``pretrain.py --method`` and after "+" in ``cross_validate.py``."""

from examples.protocol.methods.base import Pretraining
from examples.protocol.methods.caid import CAiD
from examples.protocol.methods.glcl import GLCL, GlobalGLCL
from examples.protocol.methods.kaf import KAF, PCL
from examples.protocol.methods.pirl import PIRL
from examples.protocol.methods.rotation import Rotation
from examples.protocol.methods.simclr import SimCLR
from examples.protocol.methods.ssl import SSL

__all__ = ["METHODS", "Pretraining"]

METHODS: dict[str, type[Pretraining]] = {
    "kaf": KAF,
    "pcl": PCL,
    "simclr": SimCLR,
    "rotation": Rotation,
    "pirl": PIRL,
    "glcl-global": GlobalGLCL,
    "glcl": GLCL,
    "caid": CAiD,
    "ssl": SSL,
}

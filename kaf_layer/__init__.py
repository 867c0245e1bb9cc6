"""Keypoint-augmented fusion: long-range attention for any PyTorch backbone, for the price of its keypoints."""

from kaf_layer.keypoints import Keypoints
from kaf_layer.loading import collate_keypoints as collate_keypoints  # registers it, and Keypoints for torch.load
from kaf_layer.detection import GridDetector, KeypointDetector, SIFTDetector
from kaf_layer.sampling import KeypointSampler, sample_keypoints
from kaf_layer.attention import KeypointTransformer
from kaf_layer.scattering import KeypointScatter, scatter_keypoints
from kaf_layer.diffusion import KeypointDiffusion
from kaf_layer.layer import KAFLayer, KAFOutput
from kaf_layer.encoder import KAFEncoder, KAFEncoderOutput
from kaf_layer.recording import record_attention
from kaf_layer.matching import KeypointMatcher, Matches, match_keypoints
from kaf_layer.losses import KAFPretrainingLoss, KeypointMatchLoss, PCLLoss, PretrainingLosses
from kaf_layer.augmentation import Augmented, KeypointAugmentation
from kaf_layer.interop import TokenGrid, attach
from kaf_layer import plotting as plotting  # loads matplotlib only when something is drawn

__all__ = [
    "Keypoints",
    "KeypointDetector",
    "SIFTDetector",
    "GridDetector",
    "KeypointSampler",
    "sample_keypoints",
    "KeypointTransformer",
    "KeypointScatter",
    "scatter_keypoints",
    "KeypointDiffusion",
    "KAFLayer",
    "KAFOutput",
    "KAFEncoder",
    "KAFEncoderOutput",
    "record_attention",
    "Matches",
    "match_keypoints",
    "KeypointMatcher",
    "PCLLoss",
    "KeypointMatchLoss",
    "KAFPretrainingLoss",
    "PretrainingLosses",
    "KeypointAugmentation",
    "Augmented",
    "attach",
    "TokenGrid",
]
__version__ = "0.1.0"

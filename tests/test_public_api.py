"""What users' code and checkpoints rely on: names, and the keys of state dicts. A change here is a breaking change."""

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import kaf_layer
from examples.unet import KAFUNet
from kaf_layer import GridDetector, KAFLayer, SIFTDetector
from kaf_layer.interop import attach
from kaf_layer.losses import KAFPretrainingLoss, KeypointMatchLoss, PCLLoss

NAMES = {
    "kaf_layer": """
        Keypoints KeypointDetector SIFTDetector GridDetector KeypointSampler sample_keypoints KeypointTransformer
        KeypointScatter scatter_keypoints KeypointDiffusion KAFLayer KAFOutput KAFEncoder KAFEncoderOutput
        record_attention Matches match_keypoints KeypointMatcher PCLLoss KeypointMatchLoss KAFPretrainingLoss
        PretrainingLosses KeypointAugmentation Augmented attach TokenGrid
    """,
    "kaf_layer.detection": "GridDetector KeypointDetector SIFTDetector",
    "kaf_layer.interop": "AuthorsKeys KAFBackbone TokenGrid attach keypoints_from_lafs load_authors_state_dict to_lafs",
    "kaf_layer.losses": """
        KAFPretrainingLoss KeypointMatchLoss PCLLoss PretrainingLosses keypoint_match_loss pcl_loss
    """,
    "kaf_layer.plotting": """
        COLORS draw_attention draw_image draw_keypoints draw_labels draw_matches draw_similarity self_similarity
    """,
    "kaf_layer.matching": "KeypointMatcher Matches log_sinkhorn match_keypoints",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    imported = importlib.import_module(module)
    assert set(imported.__all__) == set(NAMES[module].split())
    assert all(hasattr(imported, name) for name in imported.__all__)


def keys(names: str, *, of: str = "weight bias", under: str = "") -> set[str]:
    return {f"{under}{name}.{kind}" for name in names.split() for kind in of.split()}


def under(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


NORM = "weight bias running_mean running_var num_batches_tracked"
DIFFUSION = keys("conv1 conv2") | keys("norm", of=NORM)
POSITIONS = keys("linears.0 linears.1 linears.2 linears.3 out")
POSITION_NORMS = "norms.0 norms.1 norms.2 norms.3"
TRANSFORMER_BLOCK = keys("attention_norm attention.qkv attention.out mlp_norm mlp.0 mlp.2")
PROPAGATION_BLOCK = keys("attention.qkv attention.out expand contract") | keys("norm", of=NORM)

LAYER = (
    {"transformer.rotary.frequencies"}
    | keys("embed transformer.norm")
    | under("transformer.position_encoder", POSITIONS | keys(POSITION_NORMS))
    | under("transformer.blocks.0", TRANSFORMER_BLOCK)
    | under("diffusion", DIFFUSION)
)
PROPAGATION_LAYER = (
    keys("embed")
    | under("transformer.position_encoder", POSITIONS | keys(POSITION_NORMS, of=NORM))
    | under("transformer.blocks.0", PROPAGATION_BLOCK)
    | under("diffusion", DIFFUSION)
)
MATCHER = (
    {"dustbin"}
    | keys("out")
    | under("position_encoder", POSITIONS | keys(POSITION_NORMS, of=NORM))
    | under("blocks.0", PROPAGATION_BLOCK)
)
STATE_DICTS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "KAFLayer": (lambda: KAFLayer(4, depth=1), LAYER),
    "KAFLayer-add-3d": (lambda: KAFLayer(4, depth=1, fusion="add", spatial_dims=3), LAYER | {"gain"}),
    "KAFLayer-propagation": (lambda: KAFLayer(4, depth=1, block="propagation"), PROPAGATION_LAYER),
    "PCLLoss": (PCLLoss, set()),
    "KeypointMatchLoss": (lambda: KeypointMatchLoss(16, depth=1), under("matcher", MATCHER)),
    "KAFPretrainingLoss": (
        lambda: KAFPretrainingLoss(12, 24, matcher_depth=1),
        keys("projector.0 projector.2 token_mlp.0 token_mlp.2")
        | keys("norm", of=NORM)
        | under("match.matcher", MATCHER),
    ),
    "SIFTDetector": (SIFTDetector, set()),
    "GridDetector": (lambda: GridDetector(4), set()),
    "attach": (
        lambda: attach(nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3))), {"0.0": 4}, depth=1),
        keys("backbone.0.0") | under("layers.0_0", LAYER | {"gain"}),
    ),
}


def test_plotting_is_there_and_loads_matplotlib_when_it_draws() -> None:
    code = "import sys, kaf_layer; assert 'plotting' in dir(kaf_layer); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize(("build", "expected"), STATE_DICTS.values(), ids=STATE_DICTS)
def test_state_dict_keys(build: Callable[[], nn.Module], expected: set[str]) -> None:
    assert set(build().state_dict()) == expected


WITH_WEIGHTS: dict[str, Callable[..., nn.Module]] = {
    "KAFLayer": partial(KAFLayer, 4, fusion="add", position="both", depth=1),
    "KAFLayer-propagation": partial(KAFLayer, 4, block="propagation", spatial_dims=3, depth=1),
    "KeypointTransformer": partial(kaf_layer.KeypointTransformer, 16, depth=1),
    "KeypointDiffusion": partial(kaf_layer.KeypointDiffusion, 16, 4),
    "KeypointMatcher": partial(kaf_layer.KeypointMatcher, 16, position="both", depth=1),
    "KeypointMatchLoss": partial(KeypointMatchLoss, 16, depth=1),
    "KAFPretrainingLoss": partial(KAFPretrainingLoss, 12, 24, embed_dim=16, matcher_depth=1),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_are_made_on_a_device_in_a_type(name: str, device: str) -> None:
    """Both as in torch.nn; without them as torch's defaults say. Weights made on "meta" can be loaded."""
    build = WITH_WEIGHTS[name]
    for options, dtype in (({}, torch.float32), ({"dtype": torch.float64}, torch.float64)):
        state = build(device=device, **options).state_dict()
        assert {tensor.device.type for tensor in state.values()} == {device}
        assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {dtype}
    with torch.device(device):
        assert {tensor.device.type for tensor in build().state_dict().values()} == {device}
    trained, loaded = build(dtype=torch.float64), build(device=device, dtype=torch.float64).to_empty(device="cpu")
    loaded.load_state_dict(trained.state_dict())
    assert all(torch.equal(tensor, trained.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_every_module_with_weights_takes_a_device_and_a_type() -> None:
    modules = [value for name in kaf_layer.__all__ if inspect.isclass(value := getattr(kaf_layer, name))]
    takes = {
        module.__name__
        for module in modules
        if issubclass(module, nn.Module) and {"device", "dtype"} <= set(inspect.signature(module).parameters)
    }
    assert takes | {"KeypointMatchLoss"} == {name.split("-")[0] for name in WITH_WEIGHTS}  # which hands options on


def test_encoders_name_layers_by_their_stages() -> None:
    actual = {key for key in KAFUNet(1, 2, width=4, depth=1).state_dict() if key.startswith("encoder.layers.")}
    assert actual == set().union(*(under(f"encoder.layers.{i}", LAYER) for i in range(4)))

"""Arguments of the wrong type are refused by name, whatever takes them."""

from collections.abc import Callable
from typing import Any

import kornia.augmentation as K
import pytest
import torch
from torch import nn

from kaf_layer import (
    GridDetector,
    KAFEncoder,
    KAFLayer,
    KAFPretrainingLoss,
    KeypointAugmentation,
    KeypointDiffusion,
    KeypointMatcher,
    KeypointMatchLoss,
    Keypoints,
    KeypointSampler,
    KeypointScatter,
    KeypointTransformer,
    Matches,
    PCLLoss,
    SIFTDetector,
    match_keypoints,
)
from kaf_layer.checks import check_counts, check_precision
from kaf_layer.losses import keypoint_match_loss
from kaf_layer.matching import log_sinkhorn

SIZE = (4, 6)
KEYPOINTS = Keypoints(torch.rand(2, 3, 2), torch.ones(2, 3, dtype=torch.bool), SIZE, descriptors=torch.rand(2, 3, 5))
MATCHES = Matches(torch.full((2, 3), -1), torch.full((2, 3), -1))
HALF = Matches(MATCHES.indices[:1], MATCHES.inverse[:1])
MAP, TOKENS = torch.rand(2, 8, *SIZE), torch.rand(2, 3, 8)
SMALL = {"depth": 1, "num_heads": 2}

LAYER = KAFLayer(8, embed_dim=8, **SMALL)
DIFFUSION = KeypointDiffusion(8, 4)
TRANSFORMER = KeypointTransformer(8, **SMALL)
MATCHER = KeypointMatcher(8, iterations=2, **SMALL)
MATCH_LOSS = KeypointMatchLoss(8, iterations=2, **SMALL)
PRETRAINING = KAFPretrainingLoss(8, 8, embed_dim=8, matcher_depth=1, iterations=2)
AUGMENT = KeypointAugmentation(K.RandomHorizontalFlip(p=1.0))

# What takes each argument, by the argument's name.
MAPS: dict[str, list[Callable[[Any], Any]]] = {
    "features": [
        lambda x: LAYER(x, KEYPOINTS),
        lambda x: KAFEncoder([nn.Identity()], [LAYER])(x, KEYPOINTS),
        lambda x: KeypointSampler()(x, KEYPOINTS),
        lambda x: DIFFUSION(TOKENS, KEYPOINTS, SIZE, features=x),
    ],
    "images": [lambda x: AUGMENT(x, KEYPOINTS)],
    "bottleneck": [lambda x: PRETRAINING(x, torch.rand(2), TOKENS, KEYPOINTS, HALF)],
}
TOKEN_MODULES: dict[str, list[Callable[[Any], Any]]] = {
    "tokens": [
        lambda x: TRANSFORMER(x, KEYPOINTS),
        lambda x: DIFFUSION(x, KEYPOINTS, SIZE),
        lambda x: PRETRAINING(MAP, torch.rand(2), [x], KEYPOINTS, HALF),
    ],
    "tokens_a": [
        lambda x: MATCHER(x, KEYPOINTS, TOKENS, KEYPOINTS),
        lambda x: MATCH_LOSS(x, KEYPOINTS, TOKENS, KEYPOINTS, MATCHES),
    ],
    "tokens_b": [
        lambda x: MATCHER(TOKENS, KEYPOINTS, x, KEYPOINTS),
        lambda x: MATCH_LOSS(TOKENS, KEYPOINTS, x, KEYPOINTS, MATCHES),
    ],
}
FLOATS: dict[str, list[Callable[[Any], Any]]] = {
    "tokens": [lambda x: KeypointScatter()(x, KEYPOINTS, SIZE)],
    "embeddings": [lambda x: PCLLoss()(x, torch.rand(2))],
    "scores": [lambda x: log_sinkhorn(x, torch.tensor(1.0))],
    "dustbin": [lambda x: log_sinkhorn(TOKENS, x)],
    "log_assignment": [lambda x: keypoint_match_loss(x, KEYPOINTS, KEYPOINTS, MATCHES)],
}
REALS: dict[str, list[Callable[[Any], Any]]] = {
    "images": [SIFTDetector(), GridDetector(2)],
    "positions": [lambda x: PCLLoss()(TOKENS, x)],
    "features": [lambda x: KeypointSampler("nearest")(x, KEYPOINTS)],
    "labels": [lambda x: AUGMENT(MAP, KEYPOINTS, x)],
    "descriptors": [
        lambda x: match_keypoints(KEYPOINTS, Keypoints(TOKENS[..., :2], KEYPOINTS.valid, SIZE, descriptors=x))
    ],
}
KEYPOINT_MODULES: dict[str, list[Callable[[Any], Any]]] = {
    "keypoints": [
        lambda x: LAYER(MAP, x),
        lambda x: KeypointSampler()(MAP, x),
        lambda x: KeypointScatter()(TOKENS, x, SIZE),
        lambda x: TRANSFORMER(TOKENS, x),
        lambda x: DIFFUSION(TOKENS, x, SIZE),
        lambda x: PRETRAINING(MAP, torch.rand(2), TOKENS, x if x is not None else "none", HALF),
        lambda x: AUGMENT(MAP, x),
    ],
    "keypoints_a": [
        lambda x: MATCHER(TOKENS, x, TOKENS, KEYPOINTS),
        lambda x: keypoint_match_loss(torch.rand(2, 4, 4), x, KEYPOINTS, MATCHES),
    ],
    "keypoints_b": [
        lambda x: MATCHER(TOKENS, KEYPOINTS, TOKENS, x),
        lambda x: keypoint_match_loss(torch.rand(2, 4, 4), KEYPOINTS, x, MATCHES),
    ],
    "a": [lambda x: match_keypoints(x, KEYPOINTS)],
    "b": [lambda x: match_keypoints(KEYPOINTS, x)],
}
SIZES: list[Callable[[Any], Any]] = [
    KEYPOINTS.cells,
    KEYPOINTS.positions_in,
    KEYPOINTS.resize,
    lambda size: KeypointScatter()(TOKENS, KEYPOINTS, size),
    lambda size: DIFFUSION(TOKENS, KEYPOINTS, size),
    lambda size: Keypoints(torch.rand(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), size),
]


def each(*tables: dict[str, list[Callable[[Any], Any]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("name", "call"), [(name, call) for table in tables for name, calls in table.items() for call in calls]
    )


@pytest.mark.parametrize("wrong", [None, "abc", 1.5, [1.0], TOKENS.numpy()], ids=lambda wrong: type(wrong).__name__)
@each(MAPS, TOKEN_MODULES, FLOATS, REALS)
def test_no_tensor(name: str, call: Callable[[Any], Any], wrong: Any) -> None:
    if wrong is None and (name == "labels" or call in (MAPS["features"][3], REALS["descriptors"][0])):
        pytest.skip("may be left out")
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got {type(wrong).__name__}$"):
        call(wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
@each(MAPS, TOKEN_MODULES, FLOATS)
def test_integers(name: str, call: Callable[[Any], Any], dtype: torch.dtype) -> None:
    wrong = (MAP if name in MAPS else TOKENS).to(dtype)
    with pytest.raises(ValueError, match=rf"^{name} must be floating point \(call .float\(\)\), got {dtype}"):
        call(wrong)


@each(MAPS, TOKEN_MODULES, FLOATS, REALS)
def test_complex_numbers(name: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be real, got torch.complex64"):
        call((MAP if name in MAPS or name in ("images", "labels") else TOKENS).to(torch.complex64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each({"features": MAPS["features"][:1], "bottleneck": MAPS["bottleneck"]}, TOKEN_MODULES)
def test_another_precision_than_the_weights(name: str, call: Callable[[Any], Any], dtype: torch.dtype) -> None:
    values = (MAP if name in MAPS else TOKENS).to(dtype)
    with pytest.raises(ValueError, match=f"^{name} must be of the weights' type torch.float32 .* got {dtype}"):
        call(values)
    with torch.autocast("cpu", torch.bfloat16):
        if dtype == torch.bfloat16:
            call(values)
        else:
            with pytest.raises(ValueError, match=f"^{name} must be of the weights' type torch.float32"):
                call(values)


def test_autocast_casts_no_weights_in_double_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="float64"):
        check_precision(torch.nn.Linear(1, 1).double(), features=torch.rand(1))


@pytest.mark.parametrize("wrong", [None, "abc", TOKENS], ids=lambda wrong: type(wrong).__name__)
@each(KEYPOINT_MODULES)
def test_no_keypoints(name: str, call: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be Keypoints, got (str|{type(wrong).__name__})$"):
        call(wrong)


@each(KEYPOINT_MODULES)
def test_keypoints_of_no_tensors_or_of_one_sample(name: str, call: Callable[[Any], Any]) -> None:
    for positions, valid in ((None, KEYPOINTS.valid), (KEYPOINTS.positions, [True])):
        with pytest.raises(TypeError, match=rf"^{name} must hold tensors, got (NoneType|list) for its positions or"):
            call(Keypoints(positions, valid, SIZE))
    with pytest.raises(ValueError, match=rf"^{name} must be a batch, positions \(B, N, D\), got"):
        call(KEYPOINTS[0])


@pytest.mark.parametrize("wrong", [None, TOKENS, Matches(None, HALF.inverse), Matches(HALF.indices, "abc")])
def test_no_matches(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^matches"):
        keypoint_match_loss(torch.rand(2, 4, 4), KEYPOINTS, KEYPOINTS, wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match=r"^matches"):
            PRETRAINING(MAP, torch.rand(2), TOKENS, KEYPOINTS, wrong)


@pytest.mark.parametrize("size", [None, "ab", 8, (4.0, 6.0), (0, 6), (4, -6), (4, "6"), (4,), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("call", SIZES)
def test_sizes(call: Callable[[Any], Any], size: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        call(size)


def test_a_map_of_no_rows() -> None:
    with pytest.raises(ValueError, match="features must be a map of the keypoints' image"):
        LAYER(MAP[:, :, :0], KEYPOINTS)


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "embed_dim", "num_heads", "hidden_channels"])
@pytest.mark.parametrize("wrong", [0, -1, 2.0, "a"])
def test_options_that_are_no_counts(name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a whole number, 1 or more, got {name}={wrong!r}"):
        KAFLayer(**({"in_channels": 4} | {name: wrong}))


@pytest.mark.parametrize("build", [KAFLayer, KeypointTransformer, KeypointMatcher])
def test_a_depth_of_zero_is_one(build: Callable[..., nn.Module]) -> None:
    build(8, depth=0)
    with pytest.raises(ValueError, match="depth must be a whole number, 0 or more, got depth=-1"):
        build(8, depth=-1)


def test_counts_of_any_integer_type() -> None:
    check_counts(depth=torch.tensor([3]).numpy()[0])
    check_counts(depth=1)


def test_one_pixel_has_no_batch_statistics() -> None:
    one = Keypoints(torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), (1, 1))
    diffusion = KeypointDiffusion(8, 4)
    for method in ("rows", "hybrid", "dense"):
        diffusion.method = method
        with pytest.raises(ValueError, match=r"more than one pixel, got tokens.shape=.* and size=\(1, 1\)"):
            diffusion.train()(torch.rand(1, 1, 8), one, (1, 1))
        assert diffusion.eval()(torch.rand(1, 1, 8), one, (1, 1)).isfinite().all()

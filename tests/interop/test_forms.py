"""What attach meets in other people's networks: signatures, several maps, tokens, lists, and what cannot be."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import TARGET, random_keypoints
from torch import Tensor, nn

from kaf_layer import GridDetector, KAFLayer, Keypoints, SIFTDetector, TokenGrid, attach

pytestmark = pytest.mark.usefixtures("on_device")
SMALL = {"embed_dim": 8, "depth": 1, "num_heads": 2, "hidden_channels": 4}
IMAGES = torch.rand(2, 1, 24, 32, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
GRID = GridDetector(6)


def attached(backbone: nn.Module, names: Any, **options: Any) -> nn.Module:
    """With layers that do something."""
    model = attach(backbone, names, **{"detector": GRID, **SMALL, **options})
    for layer in model.layers.values():
        nn.init.normal_(layer.gain)
    return model.eval()


# The signature


class Named(nn.Module):
    """As a model of Transformers: the image first, and labels that make a loss."""

    config = {"width": 4}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.conv(pixel_values) * kwargs.get("scale", 1)
        return {"logits": logits} if labels is None else {"loss": (logits - labels).square().mean(), "logits": logits}


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy])
def test_the_signature_is_the_backbones_and_keypoints(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = duplicate(attached(Named(), {"conv": 4}))
    empty = inspect.Parameter.empty
    named = [("pixel_values", empty), ("labels", None), ("keypoints", None), ("kwargs", empty)]
    assert parameters(model.forward) == named
    assert parameters(type(model).forward) == [("self", empty), *named], "some frameworks look at the class"
    assert parameters(attached(nn.Sequential(nn.Conv2d(1, 2, 1)), {"0": 2}).forward) == [
        ("input", empty),
        ("keypoints", None),
    ]
    assert type(model).__name__ == "KAFBackbone"


def test_the_image_is_bound_by_the_signature_and_not_by_the_order_of_keywords() -> None:
    model = attached(Named(), {"conv": 4})
    labels = torch.rand(2, 4, 24, 32)
    expected = model(IMAGES, labels, keypoints=GRID(IMAGES))
    for output in (
        model(labels=labels, pixel_values=IMAGES),
        model(pixel_values=IMAGES, labels=labels),
        model(IMAGES, labels=labels),
    ):
        torch.testing.assert_close(output, expected, atol=0, rtol=0)
    seen = []
    model = attached(Named(), {"conv": 4}, detector=lambda images: seen.append(images) or GRID(images))
    model(scale=torch.ones(()), labels=labels, pixel_values=IMAGES)
    assert seen[0] is IMAGES


def test_what_else_the_network_has_is_told() -> None:
    model = attached(Named(), {"conv": 4})
    assert not hasattr(model, "config")
    with pytest.raises(AttributeError, match=r"no attribute 'config'; the network's own is model.backbone.config"):
        model.config  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        model.nothing  # noqa: B018
    assert model.backbone.config == {"width": 4}


# Several maps


class Stages(nn.Module):
    """As an encoder of segmentation-models-pytorch: the image itself, then a map of each stage."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, y := self.first(x), self.second(y)]


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        _, aux, out = self.stages(x)
        return {"aux": aux, "out": out}


class Whole(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x)


@pytest.mark.parametrize(
    ("encoder", "key", "channels"), [(Stages, 1, 4), (Stages, 2, 8), (Stages, -1, 8), (Auxiliary, "aux", 4)]
)
def test_one_of_several_maps_is_chosen(encoder: Callable[[], nn.Module], key: Any, channels: int) -> None:
    backbone = Whole(encoder())
    for options in ({"example": IMAGES}, {}):
        model = attached(backbone, {"encoder": None if options else channels}, outputs={"encoder": key}, **options)
        plain, output = backbone(IMAGES), model(IMAGES)
        fused = model.layers["encoder"](plain[key], GRID(IMAGES)).features
        torch.testing.assert_close(output[key], fused, atol=0, rtol=0)
        others = set(plain) - {key} if isinstance(plain, dict) else {0, 1, 2} - {key % 3}
        assert all(torch.equal(output[other], plain[other]) for other in others)
        model.remove_layers()


@pytest.mark.parametrize("example", [None, IMAGES])
def test_several_maps_are_refused(example: Tensor | None) -> None:
    several = (
        r"'encoder' returns several maps, \{.*\(2, 1, 24, 32\), .*\}: name a submodule.*outputs=\{'encoder': ...\}"
    )
    with pytest.raises(ValueError, match=several):
        attached(Whole(Stages()), {"encoder": 1}, example=example)(IMAGES)
    keys = r"outputs must name what 'encoder' returns, got 'main' for \[\"\['aux'\]\", \"\['out'\]\"\]"
    with pytest.raises(ValueError, match=keys):
        attached(Whole(Auxiliary()), {"encoder": 4}, outputs={"encoder": "main"}, example=example)(IMAGES)
    with pytest.raises(ValueError, match=r"outputs must name submodules with a layer, got \['x'\] for \['encoder'\]"):
        attached(Whole(Stages()), {"encoder": 1}, outputs={"x": 1})


# Tokens


class Transformer(nn.Module):
    """As a vision Transformer: patches of 4, prefix tokens, blocks of tokens (B, N, C)."""

    def __init__(self, *, dims: int = 2, prefix: int = 1, ceil: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.patches = conv(1, 6, 4, stride=4, padding=2 if ceil else 0)
        self.prefix = nn.Parameter(torch.rand(1, prefix, 6))
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.patches(x).flatten(2).mT
        tokens = self.block(torch.cat([self.prefix.expand(x.shape[0], -1, -1), tokens], dim=1))
        return tokens, self.head(tokens)


@pytest.mark.parametrize("size", [(24, 32), (8, 12, 16)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_are_fused_as_the_map_they_are(size: tuple[int, ...], prefix: int) -> None:
    images = torch.rand(2, 1, *size)
    backbone = Transformer(dims=len(size), prefix=prefix).eval()
    plain, _ = backbone(images)
    grid = tuple(s // 4 for s in size)
    for tokens in (
        TokenGrid(4, prefix=prefix),
        TokenGrid(size=grid, prefix=prefix),
        TokenGrid([4] * len(size), None, prefix),
    ):
        model = attach(backbone, ["block"], tokens={"block": tokens}, detector=GRID, example=images, **SMALL)
        assert model.layers["block"].in_channels == 6
        assert all(torch.equal(a, b) for a, b in zip(model(images), backbone(images), strict=True)), "until trained"
        nn.init.normal_(model.layers["block"].gain)
        feature_map = plain[:, prefix:].mT.reshape(2, 6, *grid)
        fused = model.eval().layers["block"](feature_map, GRID(images)).features
        expected = torch.cat([plain[:, :prefix], fused.reshape(2, 6, -1).mT], dim=1)
        torch.testing.assert_close(model(images)[0], expected, atol=0, rtol=0)
        assert not torch.equal(model(images)[0], plain)
        model(images)[1].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.layers.parameters())
        model.remove_layers()


def test_grids_of_images_that_patches_do_not_divide() -> None:
    for backbone, size in ((Transformer(), (26, 35)), (Transformer(ceil=True), (26, 35))):
        images = torch.rand(2, 1, *size)
        assert (
            attached(backbone, {"block": 6}, tokens=TokenGrid(4, prefix=1))(images)[0].shape
            == backbone(images)[0].shape
        )
    assert TokenGrid(4).of(tokens=6 * 8, image_size=(26, 35)) == (6, 8)
    assert TokenGrid(4).of(tokens=7 * 9, image_size=(26, 35)) == (7, 9)
    assert TokenGrid((2, 4, 4)).of(tokens=4 * 3 * 2, image_size=(8, 12, 8)) == (4, 3, 2)


def test_tokens_compile_and_export_with_any_batch() -> None:
    model = attached(Transformer(), {"block": 6}, tokens=TokenGrid(4, prefix=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=shapes).module()
    for images in (IMAGES, torch.rand(3, 1, 24, 32)):
        torch.testing.assert_close(compiled(images), model(images))
        torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"'block' must return a map.*tokens=\{'block': TokenGrid\(...\)\}"),
        (
            {"tokens": TokenGrid(4)},
            r"behind prefix=0 others: got 49 tokens for a grid of \(6, 8\) in an image of \(24, 32\)",
        ),
        ({"tokens": {"block": TokenGrid(size=(4, 12))}}, r"got 49 tokens for a grid of \(4, 12\)"),
        ({"tokens": TokenGrid((4, 4, 4))}, r"patch must have one number for each axis of the image, got \(4, 4, 4\)"),
        ({"tokens": {"blocks": TokenGrid(4)}}, r"tokens must name submodules with a layer, got \['blocks'\]"),
    ],
)
def test_tokens_that_are_no_grid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(Transformer(), {"block": 6}, **options)(IMAGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either patch or size, got patch=None and size=None"),
        ({"patch": 4, "size": (2, 2)}, "give either patch or size, got patch=4"),
        ({"patch": 0}, "patch and size must be whole numbers from 1, got 0"),
        ({"size": (4, 2.5)}, "patch and size must be whole numbers from 1"),
        ({"patch": 4, "prefix": -1}, "prefix must be a whole number, 0 or more, got prefix=-1"),
    ],
)
def test_grids_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGrid(**arguments)


def test_a_map_among_tokens_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"'patches' must return tokens \(B, N, C\), got shape \(2, 6, 6, 8\)"):
        attached(Transformer(), {"patches": 6}, tokens=TokenGrid(4))(IMAGES)


# What cannot be


def test_lists_of_images() -> None:
    class Lists(nn.Module):
        """As torchvision's detectors."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1))

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.backbone(torch.stack(images))

    whole = attached(Lists(), {"backbone.0": 4})
    with pytest.raises(
        ValueError, match=r"images must be a batch.*got shape \(1, 24, 32\).*net.backbone = attach\(net.backbone"
    ):
        whole(list(IMAGES))
    whole = Lists()
    whole.backbone = attached(whole.backbone, {"0": 4})
    torch.testing.assert_close(whole(list(IMAGES)), whole.backbone(IMAGES))


@pytest.mark.parametrize("batch", [2, 1])
def test_keypoints_of_another_image(batch: int) -> None:
    """As a whole volume's under a sliding window, which used to be placed in each window as if it were the volume."""
    model = attached(nn.Sequential(nn.Conv2d(1, 2, 1)), {"0": 2})
    keypoints = random_keypoints((48, 64), (3,) * batch, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"keypoints must be of the images that the network gets, 2 of \(24, 32\) pixels"
    ):
        model(IMAGES, keypoints=keypoints)
    if batch == 2:
        model(IMAGES, keypoints=keypoints.resize((24, 32)))
    with pytest.raises(TypeError, match="keypoints must be Keypoints, got Tensor"):
        model(IMAGES, keypoints=torch.zeros(2, 3, 2))


def test_sliding_windows_have_keypoints_of_their_own() -> None:
    inferers = pytest.importorskip("monai.inferers")
    model = attached(nn.Sequential(nn.Conv2d(1, 2, 1)), {"0": 2})
    volume, slide = torch.rand(1, 1, 24, 48), {"roi_size": (24, 24), "sw_batch_size": 1, "overlap": 0.0}
    with torch.no_grad():
        output = inferers.sliding_window_inference(volume, predictor=model, **slide)
        expected = torch.cat([model(volume[..., :24]), model(volume[..., 24:])], dim=-1)
        torch.testing.assert_close(output, expected)
        with pytest.raises(ValueError, match="In a sliding window give none"):
            inferers.sliding_window_inference(volume, predictor=model, keypoints=GRID(volume), **slide)


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_batches_with_metadata_pass_a_layer(fusion: str) -> None:
    """As MONAI's trainers make them: each image of the batch has metadata of its own."""
    data = pytest.importorskip("monai.data")
    images = [data.MetaTensor(torch.rand(8, 24, 32), affine=torch.eye(4), meta={"name": str(i)}) for i in range(2)]
    batch = data.list_data_collate(images)
    layer = KAFLayer(8, fusion=fusion, **SMALL)
    plain, output = layer(batch.as_tensor(), GRID(IMAGES)).features, layer(batch, GRID(IMAGES)).features
    assert output.meta["name"] == ["0", "1"]
    torch.testing.assert_close(output.as_tensor(), plain)
    output.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_containers_that_never_run() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)])

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return x

    message = r"'stages' is a ModuleList, which never runs itself: name one of \['stages.0', 'stages.1'\]"
    for options in ({}, {"example": IMAGES}):
        with pytest.raises(ValueError, match=message):
            attach(Looped(), {"stages": 2}, **options, **SMALL)
    attached(Looped(), {"stages.1": 2})(IMAGES)


def test_compiled_backbones() -> None:
    backbone = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1)), nn.Conv2d(2, 2, 1))
    compiled = torch.compile(backbone, backend="eager")
    compiled(IMAGES)
    with pytest.raises(ValueError, match="backbone must not be compiled, but it is: attach to the network itself"):
        attach(compiled, {"_orig_mod.0": 2}, **SMALL)
    backbone[0].compile(backend="eager")
    backbone(IMAGES)
    with pytest.raises(ValueError, match="backbone must not be compiled, but its submodule '0' is"):
        attach(backbone, {"0.0": 2}, **SMALL)
    model = attached(backbone, {"1": 2})  # where no layer is, it may be
    assert not torch.equal(model(IMAGES), backbone(IMAGES))
    whole = torch.compile(attached(nn.Sequential(nn.Conv2d(1, 2, 1)), {"0": 2}), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(IMAGES), whole._orig_mod(IMAGES))


class Layered(nn.Module):
    """A network of one's own with a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = KAFLayer(1, **SMALL)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, Keypoints(torch.zeros(2, 1, 2), torch.ones(2, 1).bool(), (24, 32))).features


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", [lambda: attached(nn.Sequential(nn.Conv2d(1, 2, 1)), {"0": 2}), Layered])
def test_torchscript_is_refused_by_name(build: Callable[[], nn.Module]) -> None:
    refused, model = pytest.raises(RuntimeError, match=r"torch.jit can neither .* use torch.export"), build().eval()
    with refused:
        torch.jit.trace(model, IMAGES)
    with refused:
        torch.jit.script(nn.ModuleList([model]))
    with refused:
        torch.onnx.export(model, (IMAGES,), dynamo=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("detector", [GRID, SIFTDetector(4)])
def test_detectors_are_not_traced(detector: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit can neither .* use torch.export"):
        torch.jit.trace(detector, IMAGES)


def test_numpy_counts() -> None:
    model = attached(nn.Sequential(nn.Conv2d(1, 2, 1)), {"0": np.int64(2)}, embed_dim=np.int64(8), depth=np.int64(1))
    assert model(IMAGES).shape == (2, 2, 24, 32)

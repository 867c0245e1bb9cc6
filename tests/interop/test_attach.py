"""attach: any network, its own output until trained, its own state dict, and every error it can explain."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from common import TARGET, generator, random_keypoints
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from kaf_layer import GridDetector, KAFLayer, Keypoints, SIFTDetector
from kaf_layer.interop import KAFBackbone, attach

pytestmark = pytest.mark.usefixtures("on_device")
SMALL = {"embed_dim": 8, "depth": 1, "num_heads": 2, "hidden_channels": 4}
IMAGES = torch.rand(2, 1, 24, 32, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
KEYPOINTS = random_keypoints((24, 32), (7, 3), dtype=torch.float32).to(TARGET.device)


def small_network() -> nn.Sequential:
    """A stem, a block that works in place, and a head of half the size."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Conv2d(8, 4, 3, stride=2, padding=1),
    )


def small_model(backbone: nn.Module | None = None, **options: Any) -> KAFBackbone:
    """With layers that do something."""
    backbone = backbone or small_network()
    model = attach(backbone, {"0": 8, "1.0": 8}, detector=GridDetector(6), **SMALL, **options)
    return awake(model)


def awake(model: KAFBackbone) -> KAFBackbone:
    for layer in model.layers.values():
        nn.init.normal_(layer.gain)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_fuses_the_maps_of_the_named_submodules(training: bool) -> None:
    model = small_model().train(training)
    backbone, layers = copy.deepcopy(model.backbone), copy.deepcopy(model.layers)
    x = layers["0"](backbone[0](IMAGES), KEYPOINTS).features
    x = layers["1_0"](backbone[1][0](x), KEYPOINTS).features
    torch.testing.assert_close(model(IMAGES, keypoints=KEYPOINTS), backbone[2](x.relu()), atol=0, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_starts_as_the_backbone(training: bool) -> None:
    backbone = small_network().train(training)
    expected = copy.deepcopy(backbone)(IMAGES)
    model = attach(backbone, {"0": 8, "1": 8}, **SMALL)
    assert model.training == training
    assert torch.equal(model(IMAGES), expected)


def test_detects_on_the_image() -> None:
    model = small_model()
    assert torch.equal(model(IMAGES), model(IMAGES, keypoints=GridDetector(6)(IMAGES)))
    assert isinstance(attach(small_network(), {"0": 8}).detector, SIFTDetector)


def test_detects_in_images_of_four_modalities() -> None:
    backbone = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    images = torch.rand(2, 4, 144, 192, generator=generator(0))
    model, images = awake(attach(backbone, {"0": 8}, **SMALL)), nn.functional.avg_pool2d(images, 3)
    assert SIFTDetector()(images).valid.any(1).all()
    assert not torch.allclose(model(images), backbone(images))


def test_any_function_is_a_detector() -> None:
    model = awake(attach(small_network(), {"0": 8}, detector=lambda images: KEYPOINTS[: len(images)], **SMALL))
    assert torch.equal(model(IMAGES), model(IMAGES, keypoints=KEYPOINTS))


def test_kornia_can_detect() -> None:
    """Kornia's DISK, here with random weights."""
    from kornia.feature import DISK

    disk = DISK().eval().requires_grad_(False)

    def detect(images: Tensor) -> Keypoints:
        found = disk(images.expand(-1, 3, -1, -1), n=20)
        size = tuple(images.shape[2:])
        return Keypoints.stack([Keypoints(f.keypoints, torch.ones(len(f.keypoints)).bool(), size) for f in found])

    model = awake(attach(small_network(), {"0": 8}, detector=detect, **SMALL))
    images = torch.rand(2, 1, 32, 48)
    assert not torch.equal(model(images), model.backbone(images))


# Names, weights, and the way back


def test_state_dict_has_two_prefixes_and_takes_the_backbones() -> None:
    backbone, model = small_network(), small_model()
    with torch.no_grad():
        backbone[0].weight.add_(1)
    keys = set(model.state_dict())
    assert {key.removeprefix("backbone.") for key in keys if key.startswith("backbone.")} == set(backbone.state_dict())
    layer = set(KAFLayer(8, fusion="add", **SMALL).state_dict())
    assert {key for key in keys if not key.startswith("backbone.")} == {
        f"layers.{name}.{key}" for name in ("0", "1_0") for key in layer
    }
    model.backbone.load_state_dict(backbone.state_dict())
    assert torch.equal(model.backbone[0].weight, backbone[0].weight)


def test_remove_layers_gives_the_original_back() -> None:
    backbone = small_network()
    before = copy.deepcopy(backbone.__dict__)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = small_model(backbone)
    assert torch.equal(model.backbone.eval()(IMAGES), small_network().eval()(IMAGES)), "by itself it is the original"
    assert model.remove_layers() is backbone
    assert backbone.train().__dict__.keys() == before.keys()
    assert not any(module._forward_hooks for module in backbone.modules())
    torch.testing.assert_close(dict(backbone.state_dict()), state, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"must run, but only \[\] did"):
        model(IMAGES)


def test_two_models_share_a_backbone() -> None:
    backbone = small_network().eval()
    first, second = small_model(backbone), awake(attach(backbone, {"0": 8}, detector=GridDetector(9), **SMALL))
    expected = first(IMAGES), second(IMAGES)
    first.remove_layers()
    assert torch.equal(second(IMAGES), expected[1])
    assert not torch.equal(*expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_duplicates_are_independent(duplicate: Callable[[KAFBackbone], KAFBackbone]) -> None:
    model = small_model().eval()
    other = duplicate(model)
    expected = model(IMAGES)
    assert torch.equal(other(IMAGES), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(IMAGES).eq(0).all()
    assert torch.equal(model(IMAGES), expected)
    assert not any(module._forward_hooks for module in other.remove_layers().modules())
    assert torch.equal(model(IMAGES), expected)


def test_saves_and_loads_weights_only() -> None:
    model, other = small_model().eval(), attach(small_network(), {"0": 8, "1.0": 8}, detector=GridDetector(6), **SMALL)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(IMAGES), model(IMAGES))


def test_a_frozen_backbone_stays_and_the_layers_learn() -> None:
    model = small_model()
    model.backbone.requires_grad_(False).eval()
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IMAGES).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.layers.parameters())
    torch.testing.assert_close(model.backbone.state_dict(), before, atol=0, rtol=0)


# Signatures and outputs


class Paired(NamedTuple):
    """What a submodule of other people's returns."""

    size: tuple[int, int]
    features: Tensor
    attention: Tensor | None


class Submodule(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        rest = x.new_ones(2, 5)
        return {
            "tuple": (x, rest),
            "list": [x, rest],
            "dict": {"out": x, "rest": rest},
            "named": Paired((1, 2), x, None),
        }[self.form]


class Network(nn.Module):
    """Time first, then the image, as in diffusion models."""

    def __init__(self, form: str = "tuple") -> None:
        super().__init__()
        self.sub = Submodule(form)

    def forward(self, time: Tensor, image: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        return {"sub": self.sub(image), "time": time * scale}


@pytest.mark.parametrize(("form", "key"), [("tuple", 0), ("list", 0), ("dict", "out"), ("named", 1)])
def test_outputs_of_any_form(form: str, key: Any) -> None:
    model = awake(attach(Network(form), {"sub": 3}, detector=GridDetector(6), image="image", **SMALL)).eval()
    output, plain = model(torch.ones(2), IMAGES, scale=3.0), model.backbone(torch.ones(2), IMAGES, scale=3.0)
    assert torch.equal(output["time"], 3 * torch.ones(2))
    assert type(output["sub"]) is type(plain["sub"])
    fused = model.layers["sub"](plain["sub"][key], GridDetector(6)(IMAGES)).features
    assert torch.equal(output["sub"][key], fused)
    for index in output["sub"] if form == "dict" else range(len(output["sub"])):
        if index != key:
            torch.testing.assert_close(output["sub"][index], plain["sub"][index])


def test_the_image_may_be_any_argument() -> None:
    model = awake(attach(Network(), {"sub": 3}, detector=GridDetector(6), image="image", **SMALL)).eval()
    expected = model(torch.ones(2), IMAGES)["sub"][0]
    assert torch.equal(model(image=IMAGES, time=torch.ones(2))["sub"][0], expected)
    first = attach(Network(), {"sub": 3}, detector=GridDetector(6), **SMALL)
    with pytest.raises(ValueError, match="images must be"):
        first(torch.ones(2), IMAGES)
    first(torch.ones(2), IMAGES, keypoints=KEYPOINTS)
    with pytest.raises(ValueError, match="there is no image"):
        model(torch.ones(2), None)


def test_channels_and_axes_are_seen_in_a_dry_run() -> None:
    backbone = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Conv3d(6, 2, 3, stride=2, padding=1))
    backbone[1].eval()
    volume, state = torch.rand(1, 1, 6, 8, 10), copy.deepcopy(backbone.state_dict())
    model = attach(backbone, ["0", "2"], detector=GridDetector(4), example=volume, **SMALL)
    assert [layer.in_channels for layer in model.layers.values()] == [6, 2]
    torch.testing.assert_close(backbone.state_dict(), state, atol=0, rtol=0)
    assert [module.training for module in backbone.modules()] == [True, True, False, True]
    assert torch.equal(model(volume), backbone(volume))
    assert not torch.equal(awake(model)(volume), backbone(volume))
    mixed = attach(Network(), {"sub": None}, example=(torch.ones(2), IMAGES), image="image", **SMALL)
    assert mixed.layers["sub"].in_channels == 3


def test_layers_follow_the_backbones_type() -> None:
    model = attach(small_network().double(), {"0": 8}, detector=GridDetector(6), **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(IMAGES.double()).dtype == torch.float64


def test_a_network_without_parameters() -> None:
    model = attach(nn.Sequential(nn.AvgPool2d(2)), {"0": 1}, **SMALL)
    assert torch.equal(model(IMAGES), nn.functional.avg_pool2d(IMAGES, 2))


# Where channels are


def convolution(channels: int, *, last: bool, stride: int = 1, dims: int = 2) -> nn.Sequential:
    """Whose map is (B, *S, C) if ``last``."""

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(1, -1).contiguous()

    torch.manual_seed(0)
    conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, channels, 3, stride=stride, padding=1)
    return nn.Sequential(nn.Sequential(conv, *[Last()] * last))


@pytest.mark.parametrize("channels", [5, None])
@pytest.mark.parametrize(("size", "stride"), [((24, 32), 2), ((41, 63), 4), ((6, 8, 10), 2), ((24, 24), 1)])
def test_channels_last_is_seen_in_the_example(size: tuple[int, ...], stride: int, channels: int | None) -> None:
    """And gives what channels first give."""
    images, outputs = torch.rand(2, 1, *size), []
    for last in (False, True):
        backbone = convolution(5, last=last, stride=stride, dims=len(size))
        model = awake(attach(backbone, {"0": channels}, detector=GridDetector(4), example=images, **SMALL))
        outputs.append(model.eval()(images))
    first, last = outputs
    torch.testing.assert_close(last.movedim(-1, 1), first)
    assert last.is_contiguous()


@pytest.mark.parametrize("last", [False, True])
def test_where_channels_are_may_be_unclear(last: bool) -> None:
    images = torch.rand(2, 1, 16, 16)
    backbone = convolution(16, last=last)
    with pytest.raises(ValueError, match=r"map of '0' could be .*: give channels_last=True, False or .*H != W, got"):
        attach(backbone, {"0": 16}, example=images, **SMALL)
    for option in (last, ["0"] if last else []):
        model = attach(backbone, ["0"], detector=GridDetector(4), example=images, channels_last=option, **SMALL)
        fused = model.layers["0"](backbone[0][0](images), GridDetector(4)(images))
        expected = awake(model).layers["0"](backbone[0][0](images), GridDetector(4)(images)).features
        assert not torch.equal(fused.features, expected)
        torch.testing.assert_close(model(images), expected.movedim(1, -1) if last else expected)
    assert model.layers["0"].in_channels == 16
    told = attach(convolution(16, last=True), {"0": 16}, channels_last="0", detector=GridDetector(4), **SMALL)
    assert told(torch.rand(2, 1, 16, 24)).shape == (2, 16, 24, 16)


def test_where_channels_are_without_an_image_to_compare() -> None:
    """The network's first tensor is a time, and keypoints are given."""

    class Timed(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.sub = convolution(5, last=last)

        def forward(self, time: Tensor, image: Tensor) -> Tensor:
            return self.sub(image) * time.view(-1, 1, 1, 1)

    for last in (False, True):
        model = attach(Timed(last), {"sub": 5}, example=(torch.ones(2), IMAGES), **SMALL)
        assert model(torch.ones(2), IMAGES, keypoints=KEYPOINTS).shape == ((2, 24, 32, 5) if last else (2, 5, 24, 32))


# Errors


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ({"1.00": 8}, {}, r"no submodule '1.00'; the closest are \['1.0', "),
        ({"": 8}, {}, "no submodule ''"),
        ({}, {}, "name a submodule or more"),
        (["0"], {}, "give the channels of '0', or an example"),
        (["3"], {"example": IMAGES}, "'3' must return a map .*got no tensor"),
        (["4"], {"example": IMAGES}, r"'4' must return a map .*got shape \(2,\)"),
        (["5.0"], {"example": IMAGES}, r"must run, but \['5.0'\] did not"),
        ({"0": 8}, {"image": "picture"}, "image='picture' and the arguments"),
        ({"0": 8}, {"channels_last": ["1"]}, r"channels_last must name submodules with a layer, got .* for \['0'\]"),
        ({"0": 7}, {"example": IMAGES}, "'0' must have the channels given, got 7 for a map"),
    ],
)
def test_errors_when_attached(names: Any, options: dict[str, Any], message: str) -> None:
    class Odd(nn.Module):
        def __init__(self, function: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Any:
            return self.function(x)

    class Whole(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return self[2](self[1](self[0](x))), self[3](x), self[4](x)

    unused = nn.ModuleList([nn.Identity()])
    backbone = Whole(*small_network(), Odd(lambda _: "no tensor"), Odd(lambda x: x.mean((1, 2, 3))), unused)
    with pytest.raises(ValueError, match=message):
        attach(backbone, names, **options, **SMALL)
    assert not any(module._forward_hooks for module in backbone.modules())


def test_one_submodule_by_two_names() -> None:
    shared = nn.Conv2d(1, 1, 3, padding=1)
    with pytest.raises(ValueError, match="a submodule of its own"):
        attach(nn.Sequential(shared, shared), {"0": 1, "1": 1})
    backbone = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Identity()}), "a_b": nn.Identity()})
    with pytest.raises(ValueError, match="a key of its own"):
        attach(backbone, {"a.b": 1, "a_b": 1})


def test_a_backbone_that_knows_keypoints() -> None:
    with pytest.raises(ValueError, match="must have no argument named keypoints"):
        attach(small_model(), {"backbone.0": 8})


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (nn.Sequential(nn.Flatten(2)), r"'0' must return a map \(B, C, \*S\), got shape \(2, "),
        (nn.Sequential(nn.Unflatten(2, (2, 12)), nn.Flatten(2, 3)), "'0' must return a map of the image.*spatial axes"),
        (nn.Sequential(nn.Unflatten(1, (1, 1))), "'0' must .*, or be named in channels_last"),
        (nn.Sequential(nn.ZeroPad2d((0, 40, 0, 0))), "'0' must return a map of the image.*whole stride"),
        (nn.Sequential(nn.Conv2d(1, 2, 1)), "'0' must return a map of the image.*in_channels=1"),
    ],
)
def test_no_map_of_the_image(backbone: nn.Module, message: str) -> None:
    model = attach(backbone.to(TARGET.device), {"0": 1}, detector=GridDetector(6), **SMALL)
    with pytest.raises(ValueError, match=message):
        model(IMAGES)


def test_a_submodule_that_runs_twice_or_never() -> None:
    shared = nn.Conv2d(1, 1, 3, padding=1)
    twice = attach(nn.Sequential(shared, shared), {"1": 1}, detector=GridDetector(6), **SMALL)
    for _ in range(2):
        with pytest.raises(ValueError, match="'1' runs more than once"):
            twice(IMAGES)

    class Skips(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](x)

    never = attach(Skips(nn.Identity(), nn.Identity()), {"0": 1, "1": 1}, detector=GridDetector(6), **SMALL)
    with pytest.raises(ValueError, match=r"must run, but only \['1'\] did"):
        never(IMAGES)


# The toolchain, as far as it concerns hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_whole(reentrant: bool) -> None:
    model = small_model().eval()
    images = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(images).square().sum(), images)
    checkpoint(model, images, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(images.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_what_holds_a_layer_is_refused(reentrant: bool) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=reentrant))

    model = small_model(Checkpointed(*small_network()))
    with pytest.raises(RuntimeError, match="'0' is run again in the backward pass"):
        model(IMAGES.clone().requires_grad_()).sum().backward()


def one_layer() -> KAFBackbone:
    return awake(attach(small_network(), {"1.0": 8}, detector=GridDetector(6), **SMALL))


def test_compiles_whole_and_once() -> None:
    model = one_layer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    for batch, slots in [(2, 8), (3, 9), (4, 12)]:  # torch tells convolutions of fewer than 16 patches apart
        images, keypoints = (
            torch.rand(batch, 1, 24, 32),
            random_keypoints((24, 32), (slots,) * batch, dtype=torch.float32),
        )
        for tensor in (images, keypoints.positions, keypoints.valid):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(keypoints.positions, 1)
        torch._dynamo.mark_dynamic(keypoints.valid, 1)
        actual, expected = compiled(images, keypoints=keypoints), model(images, keypoints=keypoints)
        torch.testing.assert_close(actual, expected)
        actual.square().sum().backward()
        expected.square().sum().backward()
    assert counter.frame_count == 1
    for p, q in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


def test_exports() -> None:
    model = one_layer().eval()
    batch, slots = torch.export.Dim("batch"), torch.export.Dim("slots")
    shapes = {"input": {0: batch}, "keypoints": [{0: batch, 1: slots}] * 2 + [(None, None), None]}
    exported = torch.export.export(model, (IMAGES,), {"keypoints": KEYPOINTS}, dynamic_shapes=shapes).module()
    images, keypoints = torch.rand(3, 1, 24, 32), random_keypoints((24, 32), (12, 0, 3), dtype=torch.float32)
    torch.testing.assert_close(exported(images, keypoints=keypoints), model(images, keypoints=keypoints))


# Networks of other people


def monai_unet(dims: int) -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(dims, 1, 2, channels=(4, 8, 16), strides=(2, 2))


def basic_unet(dims: int) -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(dims, 1, 2, features=(4, 4, 8, 8, 16, 4))


def swin_unetr(dims: int) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), spatial_dims=dims)


def dyn_unet(dims: int) -> nn.Module:
    from monai.networks.nets import DynUNet

    return DynUNet(dims, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 16], deep_supervision=True, deep_supr_num=1)


MONAI = {
    "UNet": (monai_unet, {"model.0": 4, "model.1.submodule.0": 8, "model.2": 2}),
    "BasicUNet": (basic_unet, {"conv_0": 4, "down_1": 4, "upcat_2": 4}),
    "SwinUNETR": (swin_unetr, {"swinViT.patch_embed": 12, "swinViT.layers1.0": 24, "encoder1": 12}),
    "DynUNet": (dyn_unet, {"input_block": 4, "downsamples.0": 8, "upsamples.0": 8}),
}


@pytest.mark.parametrize(("name", "dims"), [*((name, 2) for name in MONAI), ("UNet", 3), ("DynUNet", 3)])
def test_monai(name: str, dims: int) -> None:
    pytest.importorskip("monai")
    build, channels = MONAI[name]
    torch.manual_seed(0)
    check_backbone(build(dims), channels, torch.rand(2, 1, *(64, 96) if dims == 2 else (16, 8, 24)))


def test_metadata_of_monai() -> None:
    """Images that know where they are in the scanner give maps that do."""
    data = pytest.importorskip("monai.data")
    model = small_model().eval()
    output = model(data.MetaTensor(IMAGES, affine=2 * torch.eye(4)))
    assert output.affine[0, 0] == 2
    assert torch.equal(output.as_tensor(), model(IMAGES))
    images = nn.functional.avg_pool2d(torch.rand(1, 1, 144, 192, generator=generator(0)), 3)
    found, expected = SIFTDetector()(data.MetaTensor(images)), SIFTDetector()(images)
    assert expected.valid.any()
    assert type(found.positions) is Tensor
    assert torch.equal(found.positions, expected.positions)


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("monai")
    attach_monai = importlib.import_module("examples.attach_monai")
    attach_monai.main(steps=1)
    assert capsys.readouterr().out.count("True") == 2


@pytest.mark.parametrize(("name", "needs"), [("attach_timm", "timm"), ("attach_smp", "segmentation_models_pytorch")])
def test_the_examples_of_backbones(name: str, needs: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(needs)
    importlib.import_module(f"examples.{name}").main()
    printed = capsys.readouterr().out
    assert "before training: True" in printed
    assert "a training step: loss" in printed


@pytest.mark.parametrize(("name", "encoder"), [("Unet", "resnet18"), ("FPN", "mobilenet_v2")])
def test_segmentation_models(name: str, encoder: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    backbone = getattr(smp, name)(encoder, encoder_weights=None, in_channels=1, classes=2)
    names = ["encoder.layer1", "encoder.layer2"] if encoder == "resnet18" else ["encoder.features.3"]
    check_backbone(backbone, names, torch.rand(2, 1, 64, 96))


def test_timm_features() -> None:
    timm = pytest.importorskip("timm")
    backbone = timm.create_model("resnet10t", features_only=True, in_chans=1)
    check_backbone(backbone, ["layer1", "layer2"], torch.rand(2, 1, 64, 96))


def timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm")
    size = {"patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)}
    return timm.models.SwinTransformer(img_size=(64, 96), in_chans=1, num_classes=2, **size)


def torchvision_swin() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    backbone = models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=2)
    backbone.features[0][0] = nn.Conv2d(1, 12, 4, stride=4)
    return backbone


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (timm_swin, {"layers.0": 12, "layers.1": 24}),
        (torchvision_swin, {"features.0": 12, "features.1": 12, "features.3.1": 24}),
    ],
)
def test_swin_transformers_have_channels_last(build: Callable[[], nn.Module], names: dict[str, int]) -> None:
    images = torch.rand(2, 1, 64, 96)
    check_backbone(build(), names, images)
    options = {"detector": GridDetector(16), **SMALL}
    seen = attach(build(), list(names), example=images, **options)
    told = attach(build(), names, channels_last=True, **options)
    assert [layer.in_channels for layer in seen.layers.values()] == list(names.values())
    seen.load_state_dict(awake(told).state_dict())
    torch.testing.assert_close(seen.eval()(images), told.eval()(images), atol=0, rtol=0)


def test_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    check_backbone(torchvision.models.resnet18(weights=None), ["layer1", "layer2"], torch.rand(2, 3, 64, 96))


def check_backbone(backbone: nn.Module, names: dict[str, int] | list[str], images: Tensor) -> None:
    """What the package promises of any network."""
    backbone.eval()
    state = copy.deepcopy(backbone.state_dict())
    with torch.no_grad():  # DynUNet keeps its last maps, and copies only those without a graph
        expected = backbone(images)
    model = attach(backbone, names, detector=GridDetector(8), example=images, **SMALL)
    if isinstance(names, dict):
        assert [layer.in_channels for layer in model.layers.values()] == list(names.values())
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, atol=0, rtol=0)
    duplicate = copy.deepcopy(awake(model))
    model.train()
    sum(x.square().mean() for x in torch.utils._pytree.tree_leaves(model(images))).backward()
    assert all(p.grad.isfinite().all() for p in model.layers.parameters())
    assert all(layer.gain.grad.any() for layer in model.layers.values())
    model.backbone.load_state_dict(state)
    changed = model.eval()(images)
    duplicate.load_state_dict(model.state_dict())
    torch.testing.assert_close(duplicate(images), changed, atol=0, rtol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(model.remove_layers()(images), expected, atol=0, rtol=0)

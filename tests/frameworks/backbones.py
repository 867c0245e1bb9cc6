"""Networks of other people that attach is tried on. As a script it writes the table of docs/compatibility.md.

python tests/frameworks/backbones.py
"""

import copy
import importlib
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kaf_layer import GridDetector, TokenGrid, attach

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- networks -->\n", "<!-- end -->\n"
SMALL = {"embed_dim": 8, "depth": 1, "num_heads": 2, "hidden_channels": 4}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


class Case(NamedTuple):
    """A network, the submodules to attach to, the options that this needs, and the size of its images."""

    library: str
    network: str
    build: Callable[[], nn.Module]
    names: list[str]
    options: Mapping[str, Any] = MappingProxyType({})
    size: tuple[int, ...] = (1, 64, 96)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, pretrained=False, num_classes=2, **options)


def smp(name: str, encoder: str, **options: Any) -> Callable[[], nn.Module]:
    library = "segmentation_models_pytorch"
    options = {"encoder_weights": None, "in_channels": 1, "classes": 2, **options}
    return lambda: getattr(importlib.import_module(library), name)(encoder, **options)


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    models = "torchvision.models.segmentation" if "aux" in str(options) else "torchvision.models"
    return lambda: getattr(importlib.import_module(models), name)(weights=None, **options)


def monai(name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("monai.networks.nets"), name)(*arguments, **options)


def transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, name)(getattr(library, config)(**options))

    return build


def grids(*named: tuple[str, int], prefix: int = 0) -> dict[str, dict[str, TokenGrid]]:
    return {"tokens": {name: TokenGrid(patch=patch, prefix=prefix) for name, patch in named}}


SQUARE, COLOUR, VOLUME = (1, 64, 64), (3, 64, 96), (1, 32, 64, 32)
VIT = {"img_size": (64, 96), "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
CASES = [
    Case("timm", "resnet18", timm("resnet18", in_chans=1), ["layer1", "layer2"]),
    Case("timm", "convnext_atto", timm("convnext_atto", in_chans=1), ["stages.0", "stages.1"]),
    Case("timm", "efficientnet_b0", timm("efficientnet_b0", in_chans=1), ["blocks.1", "blocks.2"]),
    Case(
        "timm",
        "swin_tiny_patch4_window7_224",
        timm(
            "swin_tiny_patch4_window7_224",
            in_chans=1,
            img_size=(64, 96),
            embed_dim=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 2, 2),
        ),
        ["layers.0", "layers.1"],
    ),
    Case(
        "timm",
        "vit_tiny_patch16_224",
        timm("vit_tiny_patch16_224", **VIT),
        ["blocks.0"],
        grids(("blocks.0", 16), prefix=1),
    ),
    Case(
        "timm",
        "vit_small_patch14_reg4_dinov2",
        timm("vit_small_patch14_reg4_dinov2", **{**VIT, "img_size": (56, 84)}),
        ["blocks.0"],
        grids(("blocks.0", 14), prefix=5),
        (1, 56, 84),
    ),
    Case(
        "timm",
        "eva02_tiny_patch14_224",
        timm("eva02_tiny_patch14_224", **{**VIT, "img_size": (56, 84)}),
        ["blocks.0"],
        grids(("blocks.0", 14), prefix=1),
        (1, 56, 84),
    ),
    Case("smp", "Unet, resnet18", smp("Unet", "resnet18"), ["encoder.layer1", "encoder.layer2"]),
    Case("smp", "Unet, the encoder as a whole", smp("Unet", "resnet18"), ["encoder"]),
    Case("smp", "FPN, mobilenet_v2", smp("FPN", "mobilenet_v2"), ["encoder.features.3"]),
    Case("smp", "DeepLabV3Plus, resnet18", smp("DeepLabV3Plus", "resnet18"), ["encoder.layer2"]),
    Case("smp", "UnetPlusPlus, efficientnet-b0", smp("UnetPlusPlus", "efficientnet-b0"), ["encoder._blocks.2"]),
    Case("torchvision", "resnet18", torchvision("resnet18"), ["layer1", "layer2"], size=COLOUR),
    Case("torchvision", "swin_t", torchvision("swin_t"), ["features.1", "features.3"], size=COLOUR),
    Case(
        "torchvision",
        "deeplabv3_resnet50, auxiliary head",
        torchvision("deeplabv3_resnet50", aux_loss=True, weights_backbone=None),
        ["backbone"],
        {"outputs": {"backbone": "out"}},
        COLOUR,
    ),
    Case(
        "torchvision",
        "deeplabv3_resnet50, no map chosen",
        torchvision("deeplabv3_resnet50", aux_loss=True, weights_backbone=None),
        ["backbone"],
        size=COLOUR,
    ),
    Case(
        "MONAI", "UNet", monai("UNet", 2, 1, 2, channels=(4, 8, 16), strides=(2, 2)), ["model.0", "model.1.submodule.0"]
    ),
    Case(
        "MONAI", "UNet, volumes", monai("UNet", 3, 1, 2, channels=(4, 8, 16), strides=(2, 2)), ["model.0"], size=VOLUME
    ),
    Case("MONAI", "BasicUNet", monai("BasicUNet", 2, 1, 2, features=(4, 4, 8, 8, 16, 4)), ["conv_0", "down_1"]),
    Case(
        "MONAI",
        "SegResNet, volumes",
        monai("SegResNet", 3, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        ["down_layers.1"],
        size=VOLUME,
    ),
    Case(
        "MONAI",
        "DynUNet",
        monai("DynUNet", 2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 16]),
        ["input_block", "downsamples.0"],
    ),
    Case(
        "MONAI",
        "SwinUNETR, volumes",
        monai("SwinUNETR", 1, 2, feature_size=12, depths=(1,) * 4, spatial_dims=3),
        ["swinViT.patch_embed", "encoder1"],
        size=VOLUME,
    ),
    Case(
        "MONAI",
        "UNETR, volumes",
        monai("UNETR", 1, 2, (32, 64, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2),
        ["vit.blocks.3"],
        grids(("vit.blocks.3", 16)),
        VOLUME,
    ),
    Case(
        "transformers",
        "ViTForImageClassification",
        transformers("ViTForImageClassification", "ViTConfig", image_size=(64, 96), num_channels=1, **TINY),
        ["vit.layers.0"],
        grids(("vit.layers.0", 16), prefix=1),
    ),
    Case(
        "transformers",
        "Dinov2Model",
        transformers("Dinov2Model", "Dinov2Config", image_size=56, patch_size=14, num_channels=1, **TINY),
        ["encoder.layer.0"],
        grids(("encoder.layer.0", 14), prefix=1),
        (1, 56, 84),
    ),
    Case(
        "transformers",
        "Dinov2WithRegistersModel",
        transformers(
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersConfig",
            image_size=56,
            patch_size=14,
            num_channels=1,
            **TINY,
        ),
        ["encoder.layer.0"],
        grids(("encoder.layer.0", 14), prefix=5),
        (1, 56, 84),
    ),
    Case(
        "transformers",
        "SegformerForSemanticSegmentation",
        transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_channels=1,
            depths=[1] * 4,
            hidden_sizes=[8, 16, 16, 32],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        ),
        ["segformer.stages.0.blocks.0", "segformer.stages.1.blocks.0"],
        grids(("segformer.stages.0.blocks.0", 4), ("segformer.stages.1.blocks.0", 8)),
    ),
    Case(
        "transformers",
        "SwinModel",
        transformers(
            "SwinModel",
            "SwinConfig",
            image_size=(64, 96),
            num_channels=1,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
        ),
        ["encoder.layers.0.blocks.1"],
        grids(("encoder.layers.0.blocks.1", 4)),
    ),
    Case(
        "transformers",
        "DPTForSemanticSegmentation",
        transformers(
            "DPTForSemanticSegmentation",
            "DPTConfig",
            image_size=64,
            num_channels=1,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=8,
            **{**TINY, "num_hidden_layers": 4},
        ),
        ["dpt.encoder.layer.0"],
        grids(("dpt.encoder.layer.0", 16), prefix=1),
        SQUARE,
    ),
    Case(
        "transformers",
        "BeitModel",
        transformers("BeitModel", "BeitConfig", image_size=64, num_channels=1, **TINY),
        ["layers.0"],
        grids(("layers.0", 16), prefix=1),
        SQUARE,
    ),
    Case(
        "transformers",
        "ViTModel, tokens not named",
        transformers("ViTModel", "ViTConfig", image_size=(64, 96), num_channels=1, **TINY),
        ["layers.0"],
    ),
]


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def attempt(case: Case) -> str:
    """Attaches, and checks what is promised; "works", or the message with which it is refused."""
    torch.manual_seed(0)
    backbone, images = case.build().eval(), torch.rand(2, *case.size)
    with torch.no_grad():
        expected = copy.deepcopy(tensors(backbone(images)))
    try:
        model = attach(backbone, case.names, detector=GridDetector(8), example=images, **SMALL, **case.options)
    except ValueError as error:
        return f"refused: {error}"
    with torch.no_grad():
        assert all(map(torch.equal, tensors(model(images)), expected)), "it does not start as the network"
    for layer in model.layers.values():
        nn.init.normal_(layer.gain)
    changed = tensors(model(images))
    assert not all(map(torch.equal, changed, expected)), "the layers change nothing"
    sum(output.square().mean() for output in changed if output.requires_grad).backward()
    for name, layer in model.layers.items():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters()), name
        assert layer.gain.grad.any(), f"{name} gets no gradient"
    with torch.no_grad():
        assert all(map(torch.equal, tensors(model.remove_layers()(images)), expected)), "it does not end as the network"
    return "works"


PACKAGES = {"smp": "segmentation-models-pytorch", "MONAI": "monai"}


def row(case: Case, result: str) -> str:
    names = ", ".join(f"`{name}`" for name in case.names)
    needs = ", ".join(f"`{option}=`" for option in case.options)
    result = re.sub(r"([|*\\])", r"\\\1", result)
    library = f"{case.library} {version(PACKAGES.get(case.library, case.library))}"
    return f"| {library} | {case.network} | {names} | {needs} | {result} |\n"


def main() -> None:
    text = PAGE.read_text()
    table = "| library | network | submodules | needs | |\n| --- | --- | --- | --- | --- |\n"
    for case in CASES:
        table += row(case, attempt(case))
        print(table.splitlines()[-1], flush=True)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + table + END + after)


if __name__ == "__main__":
    main()

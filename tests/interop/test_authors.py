"""Our layer and UNets are the paper's: they give the numbers of the authors' own code."""

import pytest
import torch
from reference import needs_reference, numbers, relative_error, state_dict
from torch import Tensor

from examples.unet import KAFUNet, UNet, UNetC2
from kaf_layer import KAFLayer, Keypoints
from kaf_layer.interop import load_authors_state_dict

PROPAGATION = {"block": "propagation", "sampling": "nearest"}


def authors_keypoints(yx: Tensor, image_size: tuple[int, int]) -> Keypoints:
    return Keypoints(yx.flip(-1).float(), torch.ones(yx.shape[:2], dtype=torch.bool), image_size)


def authors_layer() -> KAFLayer:
    layer = KAFLayer(16, depth=4, **PROPAGATION)
    load_authors_state_dict(layer, state_dict("kaf_layer"))
    return layer


@needs_reference
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_layer(mode: str) -> None:
    expected = {name.removeprefix(f"layer.{mode}."): value for name, value in numbers().items()}
    layer = authors_layer().train(mode == "train")
    features = expected["layer.feature_map"].requires_grad_()
    fused, tokens = layer(features, authors_keypoints(expected["layer.keypoints_yx"], (32, 32)))
    diffused = fused[:, 16:]
    (diffused * expected["layer.out_grad"]).sum().backward()
    actual = {
        "out": diffused,
        "tokens": tokens.mT,
        "grad_feature_map": features.grad,
        "grad_feature_mlp": layer.embed.weight.grad[..., None],
        "grad_diffusion0": layer.diffusion.conv1.weight.grad[:, :8],
    }
    if mode == "train":
        actual["running_mean_after"] = layer.diffusion.norm.running_mean
        actual["running_var_after"] = layer.diffusion.norm.running_var
    errors = {name: relative_error(value, expected[name]) for name, value in actual.items()}
    assert max(errors.values()) < 1e-4, errors
    assert torch.equal(fused[:, :16], features)


@needs_reference
@pytest.mark.parametrize("name", ["unet", "kaf_unet"])
def test_unets(name: str) -> None:
    model = UNet(width=8) if name == "unet" else KAFUNet(width=8, depth=2, **PROPAGATION)
    load_authors_state_dict(model, state_dict(name))
    expected = numbers()
    keypoints = authors_keypoints(expected["unet.keypoints_yx"], (64, 64))
    logits = model.eval()(expected["unet.image"], keypoints)
    assert relative_error(logits, expected[f"{name}.logits"]) < 1e-4


@needs_reference
def test_running_statistics_of_attention_follow_two_updates() -> None:
    once = authors_layer()
    expected = numbers()
    keypoints = authors_keypoints(expected["layer.keypoints_yx"], (32, 32))
    norm = once.transformer.blocks[0].norm
    before, hidden = norm.running_mean.clone(), []
    norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    once(expected["layer.feature_map"], keypoints)
    twice = torch.nn.BatchNorm1d(512)
    twice.running_mean.copy_(before)
    for _ in range(2):
        twice(hidden[0].flatten(0, 1))
    torch.testing.assert_close(norm.running_mean, twice.running_mean)


@needs_reference
def test_keys_taken_and_left() -> None:
    weights = state_dict("kaf_unet")
    taken, left = load_authors_state_dict(KAFUNet(width=8, depth=2, **PROPAGATION), weights)
    assert sorted(taken + left) == sorted(weights)
    assert len(left) == 4 * 3
    assert sum(weights[key].numel() for key in left) == 263_172


@needs_reference
def test_wrong_state_dicts_are_refused_by_name() -> None:
    weights = state_dict("kaf_layer")
    layer = KAFLayer(16, depth=4, **PROPAGATION)
    before = layer.state_dict()["embed.bias"].clone()
    proj = "superglue.gnn.layers.1.attn.proj.2.weight"
    with pytest.raises(ValueError, match=rf"{proj}: expected shape \(256, 256, 1\), got \(256, 128, 1\)"):
        load_authors_state_dict(layer, weights | {proj: torch.zeros(256, 128, 1)})
    with pytest.raises(ValueError, match=r"no place for 1 keys, such as \['extra\.weight'\]"):
        load_authors_state_dict(layer, weights | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"nothing for 1, such as \['embed\.weight'\]"):
        load_authors_state_dict(layer, {k: v for k, v in weights.items() if k != "feature_mlp.weight"})
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.qkv\.2\.bias"):
        load_authors_state_dict(layer, {k: v for k, v in weights.items() if not k.endswith("proj.2.bias")})
    with pytest.raises(ValueError, match=r"has 4 heads, make the module with as many, got \{8\}"):
        load_authors_state_dict(KAFLayer(16, depth=4, num_heads=8, **PROPAGATION), weights)
    assert torch.equal(layer.embed.bias, before)


@pytest.mark.parametrize(
    ("model", "width", "classes", "count"),
    [
        (UNet, 32, 8, 7_763_584),
        (UNet, 48, 4, 17_462_016),
        (KAFUNet, 32, 8, 71_467_264),
        (KAFUNet, 48, 4, 106_546_624),
    ],
)
def test_parameter_counts(model: type[UNet], width: int, classes: int, count: int) -> None:
    options = {"depth": 16, "block": "propagation"} if model is KAFUNet else {}
    with torch.device("meta"):
        network = model(1, classes, width=width, **options)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("width", "classes", "millions"), [(32, 8, 27.9), (48, 4, 62.8)])
def test_parameter_counts_of_the_wider_control(width: int, classes: int, millions: float) -> None:
    with torch.device("meta"):
        network = UNetC2(1, classes, width=width)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions

"""Adapters (peft's LoRA) and quantized weights (torchao) inside a layer: trained, used, and refused by nobody."""

import pytest
import torch
from torch import nn

from kaf_layer import KAFLayer, Keypoints

METHODS = ["rows", "hybrid", "dense"]
peft = pytest.importorskip("peft", reason="in the environment of `make frameworks`")
quantization = pytest.importorskip("torchao.quantization", reason="in the environment of `make frameworks`")


def layer(**options: object) -> KAFLayer:
    torch.manual_seed(0)
    return KAFLayer(8, embed_dim=32, depth=2, hidden_channels=8, **options)


def inputs() -> tuple[torch.Tensor, Keypoints]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(2, 9, 2, generator=generator) * torch.tensor([24.0, 16.0])
    return torch.randn(2, 8, 16, 24, generator=generator), Keypoints(
        positions, torch.arange(18).view(2, 9) % 4 > 0, (16, 24)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_lora(block: str, method: str) -> None:
    """Every adapter gets a gradient and counts; merging it changes nothing."""
    names = ["embed", "qkv", "out", "expand", "contract", "mlp.0", "mlp.2", "conv1", "conv2"]
    module = layer(block=block)
    module.diffusion.method = method
    names = [name for name in names if any(f".{n}".endswith(f".{name}") for n, _ in module.named_modules())]
    model = peft.get_peft_model(module, peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False))
    assert torch.isfinite(model(*inputs()).features).all()
    model(*inputs()).features.square().sum().backward()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
    model.eval()
    adapted = model(*inputs()).features
    with model.disable_adapter():
        assert (model(*inputs()).features - adapted).abs().max() > 1e-3
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(*inputs()).features, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_int8_weights(method: str) -> None:
    module, quantized = layer().eval(), layer().eval()
    for m in (module, quantized):
        m.diffusion.method = method
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    kinds = {type(m.weight) for m in quantized.modules() if isinstance(m, nn.Linear)}
    assert nn.Parameter not in kinds
    expected, actual = (m(*inputs()).features[:, 8:] for m in (module, quantized))
    assert 0 < (actual - expected).norm() < 0.05 * expected.norm()

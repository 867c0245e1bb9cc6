"""KeypointTransformer against the formulas written out, one sample and one head at a time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from common import fill_padding, random_keypoints
from torch import Tensor, nn

from kaf_layer import Keypoints, KeypointTransformer
from kaf_layer.attention import Attention, PositionEncoder, PropagationBlock, TransformerBlock, key_mask
from kaf_layer.normalization import MaskedBatchNorm, track


def rotate(values: Tensor, angles: Tensor | None) -> Tensor:
    """A head's queries or keys (N, W) as complex numbers, times exp(i f . p) (Su et al., 2021, Section 3.2)."""
    if angles is None:
        return values
    real, imaginary = values.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attend(attention: Attention, tokens: Tensor, source: Tensor, angles: Tensor | None = None) -> Tensor:
    """Multi-head attention of one sample (Vaswani et al., 2017, Section 3.2), head by head."""
    embed_dim = tokens.shape[-1]
    w_query, w_key, w_value = attention.qkv.weight.split(embed_dim)
    b_query, b_key, b_value = attention.qkv.bias.split(embed_dim)
    query, key, value = tokens @ w_query.T + b_query, source @ w_key.T + b_key, source @ w_value.T + b_value
    width, heads = embed_dim // attention.num_heads, []
    for head in range(attention.num_heads):
        own = slice(head * width, (head + 1) * width)
        turned_query, turned_key = (rotate(values[:, own], angles) for values in (query, key))
        scores = turned_query @ turned_key.T / math.sqrt(width)
        heads.append((scores.exp() / scores.exp().sum(1, keepdim=True)) @ value[:, own])
    return torch.cat(heads, dim=1) @ attention.out.weight.T + attention.out.bias


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def batch_norm(norm: MaskedBatchNorm, samples: list[Tensor]) -> list[Tensor]:
    """Over the rows of all samples together, as torch's batch norm, in training mode."""
    rows = F.batch_norm(torch.cat(samples), None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return list(rows.split([len(sample) for sample in samples]))


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("position", ["both", "rotary", "absolute", "none"])
def test_transformer_against_formulas(position: str) -> None:
    keypoints = random_keypoints((12, 20), (5, 0, 3))
    transformer = randomise(KeypointTransformer(8, depth=2, num_heads=2, position=position).double())
    tokens = torch.randn(*keypoints.valid.shape, 8, dtype=torch.float64)
    actual = transformer(fill_padding(tokens, keypoints), keypoints)
    for sample in range(3):
        valid = keypoints.valid[sample]
        positions = (2 * keypoints.positions[sample, valid] + 1 - torch.tensor([20, 12])) / 20
        x, encoder, code = tokens[sample, valid], transformer.position_encoder, positions
        if position in ("both", "absolute"):
            for linear, norm in zip(encoder.linears, encoder.norms, strict=True):
                code = layer_norm(norm, code @ linear.weight.T + linear.bias).clamp(min=0)
            x = x + code @ encoder.out.weight.T + encoder.out.bias
        for i, block in enumerate(transformer.blocks):
            normed = layer_norm(block.attention_norm, x)
            angles = None if transformer.rotary is None else positions @ transformer.rotary.frequencies[i].T
            x = x + attend(block.attention, normed, normed, angles)
            expand, _, contract = block.mlp
            hidden = layer_norm(block.mlp_norm, x) @ expand.weight.T + expand.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + hidden @ contract.weight.T + contract.bias
        torch.testing.assert_close(actual[sample, valid], layer_norm(transformer.norm, x))
        assert actual[sample, ~valid].eq(0).all()


@pytest.mark.parametrize("image_size", [(12, 20), (6, 4, 8)])
@pytest.mark.parametrize("recompute", [False, True])
def test_propagation_against_formulas_in_training(image_size: tuple[int, ...], recompute: bool) -> None:
    keypoints = random_keypoints(image_size, (5, 0, 3))
    options = {"spatial_dims": len(image_size), "recompute": recompute}
    transformer = KeypointTransformer(8, depth=2, num_heads=2, block="propagation", **options).double()
    randomise(transformer)
    tokens = torch.randn(*keypoints.valid.shape, 8, dtype=torch.float64, requires_grad=True)
    actual = transformer(fill_padding(tokens, keypoints), keypoints)

    half = torch.tensor(image_size[::-1]) / 2
    x = [(keypoints.positions[i, v].flip(-1) - half) / (0.7 * max(image_size)) for i, v in enumerate(keypoints.valid)]
    encoder = transformer.position_encoder
    for linear, norm in zip(encoder.linears, encoder.norms, strict=True):
        x = [p.relu() for p in batch_norm(norm, [linear(p) for p in x])]
    x = [tokens[i, v] + encoder.out(p) for i, (v, p) in enumerate(zip(keypoints.valid, x, strict=True))]
    for block in transformer.blocks:
        messages = [torch.cat([t, attend(block.attention, t, t)], dim=1) for t in x]
        hidden = batch_norm(block.norm, [block.expand(m) for m in messages])
        x = [t + block.contract(h.relu()) for t, h in zip(x, hidden, strict=True)]
    for sample, expected in enumerate(x):
        torch.testing.assert_close(actual[sample, keypoints.valid[sample]], expected)

    weight = torch.rand_like(actual)
    loss = sum((t * weight[i, keypoints.valid[i]]).sum() for i, t in enumerate(x))
    parameters = (tokens, *transformer.parameters())
    expected_gradients = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(torch.autograd.grad((actual * weight).sum(), parameters), expected_gradients)


def test_cross_attention_against_formulas() -> None:
    own, other = random_keypoints((12, 20), (4, 2)), random_keypoints((12, 20), (3, 5), seed=1)
    block = randomise(PropagationBlock(8, num_heads=2).double()).eval()
    tokens = torch.randn(*own.valid.shape, 8, dtype=torch.float64)
    source = torch.randn(*other.valid.shape, 8, dtype=torch.float64)
    actual = block(tokens, own.valid, key_mask(other, torch.float64), source)
    for sample in range(2):
        x = tokens[sample, own.valid[sample]]
        message = attend(block.attention, x, source[sample, other.valid[sample]])
        hidden = block.expand(torch.cat([x, message], dim=1)) / math.sqrt(1 + block.norm.eps)
        expected = x + block.contract((hidden * block.norm.weight + block.norm.bias).relu())
        torch.testing.assert_close(actual[sample, own.valid[sample]], expected)


def test_masked_batch_norm_is_batch_norm_of_the_valid_rows() -> None:
    valid = torch.tensor([[True, False, True], [False] * 3, [True, True, True]])
    ours, theirs = randomise(MaskedBatchNorm(4, momentum=0.3)), nn.BatchNorm1d(4, momentum=0.3)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = 5 + 2 * torch.randn(3, 3, 4)
        normalised, moments = ours(x, valid)
        track(ours, moments)
        torch.testing.assert_close(normalised[valid], theirs(x[valid]))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name])
    torch.testing.assert_close(ours.eval()(x, valid)[0][valid], theirs.eval()(x[valid]))


def test_running_statistics_stay_where_there_is_nothing_to_learn() -> None:
    norm = MaskedBatchNorm(4)
    track(norm, norm(torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))[1])
    assert norm.running_mean.eq(0).all()
    assert norm.running_var.eq(1).all()


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_recomputation_changes_nothing_but_memory(block: str) -> None:
    keypoints = random_keypoints((12, 20), (5, 0, 3))
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        transformer = KeypointTransformer(8, depth=3, num_heads=2, block=block, recompute=recompute).double()
        tokens = torch.randn(*keypoints.valid.shape, 8, dtype=torch.float64, requires_grad=True)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            output = transformer(tokens, keypoints)
        output.sin().sum().backward()
        gradients = {name: p.grad for name, p in transformer.named_parameters()}
        results.append((output, tokens.grad, gradients, dict(transformer.named_buffers()), sum(saved)))
    torch.testing.assert_close(results[0][:4], results[1][:4], atol=1e-12, rtol=0)
    assert results[1][4] < results[0][4]


def test_no_mask_where_nothing_is_padded() -> None:
    keypoints = random_keypoints((12, 20), (6, 6), slots=6)
    assert key_mask(keypoints, torch.float64).shape == (2, 1, 1, 6)
    transformer = KeypointTransformer(8, depth=1, num_heads=2).double()
    tokens = torch.randn(2, 6, 8, dtype=torch.float64)
    masked = transformer(tokens, keypoints)
    keypoints.padded = False
    assert key_mask(keypoints, torch.float64) is None
    torch.testing.assert_close(transformer(tokens, keypoints), masked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_autocast(block: str, dtype: torch.dtype) -> None:
    keypoints = random_keypoints((12, 20), (20, 15), dtype=torch.float32)
    transformer = KeypointTransformer(32, depth=2, block=block)
    tokens = torch.randn(*keypoints.valid.shape, 32)
    expected = transformer(tokens, keypoints)
    with torch.autocast("cpu", dtype):
        actual = transformer(tokens, keypoints)
    actual.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in transformer.parameters() if p.grad is not None)
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


def test_tokens_are_summed_in_single_precision_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, a deep Transformer on half-precision tokens errs less than with a sum in half precision."""
    keypoints = random_keypoints((12, 20), (20, 15), dtype=torch.float32)
    torch.manual_seed(0)
    transformer = KeypointTransformer(32, depth=24, position="none")
    tokens = (8 * torch.randn(*keypoints.valid.shape, 32)).bfloat16()
    expected = copy.deepcopy(transformer).double()(tokens.double(), keypoints).detach()

    def error() -> float:
        types: set[torch.dtype] = set()
        handles = [b.register_forward_pre_hook(lambda _, args: types.add(args[0].dtype)) for b in transformer.blocks]
        with torch.autocast("cpu", torch.bfloat16):
            actual = transformer(tokens, keypoints).detach()
        for handle in handles:
            handle.remove()
        assert actual.dtype == tokens.dtype
        assert types == {torch.float32 if single else torch.bfloat16}
        return float((actual.double() - expected).norm() / expected.norm())

    single = True
    ours = error()
    monkeypatch.setattr("kaf_layer.attention.single_under_autocast", lambda values: values)
    single = False
    assert 4 * ours < error()


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_autocast_encodes_positions_in_single_precision(block: str) -> None:
    """Neighbouring pixels of a large image, which bfloat16 cannot tell apart, keep different codes."""
    x = torch.arange(1000.0, 1010)
    keypoints = Keypoints(torch.stack([x, x], dim=-1)[None], torch.ones(1, 10, dtype=torch.bool), (1024, 2048))
    encoder = PositionEncoder(32, block=block).eval()
    expected = encoder(keypoints)
    with torch.autocast("cpu", torch.bfloat16):
        actual = encoder(keypoints)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(actual[0].unique(dim=0)) == 10


def test_the_mask_fits_rows_of_eight() -> None:
    """Which is what fused kernels of CUDA read without a copy; what it adds follows from its shape only."""
    keypoints = random_keypoints((12, 20), (5, 0, 3), slots=11)
    mask = key_mask(keypoints, torch.float32)
    assert mask.shape == (3, 1, 1, 11)
    assert mask.stride() == (16, 16, 16, 1)
    assert (mask == 0)[:, 0, 0].equal(keypoints.valid | ~keypoints.valid.any(dim=1, keepdim=True))
    assert mask.isneginf().equal(mask != 0)


def test_errors() -> None:
    keypoints = random_keypoints((12, 20), (3, 1))
    with pytest.raises(ValueError, match="embed_dim=30 and num_heads=4"):
        KeypointTransformer(30)
    with pytest.raises(ValueError, match="block='mamba'"):
        KeypointTransformer(block="mamba")
    with pytest.raises(ValueError, match=r"tokens.shape=torch.Size\(\[2, 4, 8\]\)"):
        KeypointTransformer(8, depth=1)(torch.rand(2, 4, 8), keypoints)
    with pytest.raises(ValueError, match=r"spatial_dims=3.*image_size=\(12, 20\)"):
        KeypointTransformer(8, depth=1, spatial_dims=3)(torch.rand(2, 5, 8), keypoints)


@pytest.mark.parametrize("block", [TransformerBlock, PropagationBlock])
def test_blocks_have_four_heads_and_save_activations(block: type[nn.Module]) -> None:
    assert block().attention.num_heads == 4
    assert block().attention.out.in_features == 256
    assert not block().recompute


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_options_reach_the_blocks(block: str) -> None:
    transformer = KeypointTransformer(6, depth=3, num_heads=3, block=block, spatial_dims=3, recompute=True)
    assert len(transformer.blocks) == 3
    assert all(b.recompute and b.attention.num_heads == 3 for b in transformer.blocks)
    assert transformer.position_encoder.linears[0].in_features == 3
    with pytest.raises(ValueError, match="spatial_dims must be a whole number"):
        KeypointTransformer(6, num_heads=3, block=block, spatial_dims=0)


@pytest.mark.parametrize("block", ["transformer", "propagation"])
def test_positions_are_relative_to_the_image(block: str) -> None:
    """Against the formulas: half the longest edge about the centre, or the authors' 0.7 and their order of axes."""
    keypoints = random_keypoints((12, 20), (5, 0, 3))
    encoder = randomise(PositionEncoder(8, block=block)).double().eval()
    encoded = encoder(keypoints)
    for sample, slot in keypoints.valid.nonzero().tolist():
        x, y = keypoints.positions[sample, slot].tolist()
        relative = (x - 9.5) / 10, (y - 5.5) / 10
        if block == "propagation":
            relative = (y - 10) / 14, (x - 6) / 14
        values = torch.tensor(relative, dtype=torch.float64)
        for linear, norm in zip(encoder.linears, encoder.norms, strict=True):
            values = values @ linear.weight.T + linear.bias
            if block == "transformer":
                values = layer_norm(norm, values).relu()
            else:  # whose running statistics are still 0 and 1
                values = (values / (1 + norm.eps) ** 0.5 * norm.weight + norm.bias).relu()
        torch.testing.assert_close(encoded[sample, slot], values @ encoder.out.weight.T + encoder.out.bias)

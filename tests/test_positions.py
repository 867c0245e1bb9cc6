"""Encodings of positions: rotations against complex numbers, the law of translation, and that they are used."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from common import fill_padding, random_keypoints
from torch import Tensor, nn
from torch.export import Dim

from kaf_layer import KAFLayer, Keypoints, KeypointTransformer, attach, record_attention
from kaf_layer.matching import KeypointMatcher
from kaf_layer.positions import RotaryEncoder, relative_positions, rotate

POSITIONS = ("both", "rotary", "absolute", "none")
SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2}


def transformer_of(position: str, *, dims: int = 2, **options: object) -> KeypointTransformer:
    torch.manual_seed(0)
    return KeypointTransformer(8, depth=2, num_heads=2, position=position, spatial_dims=dims, **options).double()


@pytest.mark.parametrize("image_size", [(12, 20), (6, 4, 8)])
def test_rotations_against_complex_numbers(image_size: tuple[int, ...]) -> None:
    """Channels c and c + W/2 are a number's real and imaginary part, and are multiplied by exp(i f . p)."""
    keypoints = random_keypoints(image_size, (5, 0, 3))
    rotary = RotaryEncoder(6, depth=3, spatial_dims=len(image_size)).double()
    heads = torch.randn(3, keypoints.valid.shape[1], 2, 6, dtype=torch.float64)
    rotations = rotary(relative_positions(keypoints, spatial_dims=len(image_size)))
    block = 1
    actual = rotate(heads, rotations[block])
    for sample, slot in keypoints.valid.nonzero().tolist():
        centre = [(edge - 1) / 2 for edge in reversed(image_size)]
        place = keypoints.positions[sample, slot].tolist()
        unit = [(p - c) / (max(image_size) / 2) for p, c in zip(place, centre, strict=True)]
        for pair, frequency in enumerate(rotary.frequencies[block].tolist()):
            turn = complex(math.cos(angle := sum(f * u for f, u in zip(frequency, unit, strict=True))), math.sin(angle))
            for head in range(2):
                real, imaginary = heads[sample, slot, head, [pair, pair + 3]].tolist()
                turned = complex(real, imaginary) * turn
                found = actual[sample, slot, head, [pair, pair + 3]].tolist()
                assert found == pytest.approx([turned.real, turned.imag])


def test_frequencies_start_from_1_to_30_radians() -> None:
    torch.manual_seed(0)
    frequencies = RotaryEncoder(32, spatial_dims=3).frequencies[0]
    lengths = frequencies.norm(dim=1)
    torch.testing.assert_close(lengths, 30 ** torch.linspace(0, 1, 16))
    directions = frequencies / lengths[:, None]
    assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 1 - 1e-6
    assert RotaryEncoder(2).frequencies.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("image_size", [(40, 64), (40, 48, 56)])
@pytest.mark.parametrize("position", POSITIONS)
def test_translation_of_all_keypoints(position: str, image_size: tuple[int, ...]) -> None:
    """By one vector: it changes nothing where only differences count. Anything else changes something."""
    transformer = transformer_of(position, dims=len(image_size))
    keypoints = random_keypoints(tuple(edge // 2 for edge in image_size), (7, 0, 4))
    keypoints = Keypoints(keypoints.positions, keypoints.valid, image_size)
    tokens = torch.randn(*keypoints.valid.shape, 8, dtype=torch.float64)
    step = torch.tensor([15.3, 9.7, 11.1][: len(image_size)], dtype=torch.float64)
    moved = Keypoints(keypoints.positions + step, keypoints.valid, image_size)
    stretched = Keypoints(keypoints.positions * 1.5, keypoints.valid, image_size)
    before, after, other = (transformer(fill_padding(tokens, kp), kp) for kp in (keypoints, moved, stretched))
    assert (
        (before - after).abs().max().item() == pytest.approx(0, abs=1e-12) if position in ("rotary", "none") else True
    )
    assert ((before - after).abs().max() > 1e-4) == (position in ("absolute", "both"))
    assert ((before - other).abs().max() > 1e-4) == (position != "none")


@pytest.mark.parametrize("position", ["both", "rotary", "none"])
def test_padding_influences_nothing(position: str) -> None:
    transformer = transformer_of(position)
    keypoints = random_keypoints((12, 20), (5, 0, 3))
    tokens = torch.randn(*keypoints.valid.shape, 8, dtype=torch.float64)
    results = []
    for garbage in (0.0, float("nan"), float("inf"), 1e30):
        where = keypoints.positions.masked_fill(~keypoints.valid[..., None], garbage)
        own = copy.deepcopy(transformer)
        x = fill_padding(tokens, keypoints, garbage).requires_grad_()
        y = own(x, Keypoints(where, keypoints.valid, keypoints.image_size))
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in own.parameters())])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=0, rtol=0)
    for i in (0, 2):  # and a sample alone, without padding, gives the same
        valid = keypoints.valid[i]
        alone = Keypoints(keypoints.positions[None, i, valid], valid[None, valid], (12, 20), padded=False)
        torch.testing.assert_close(transformer(tokens[None, i, valid], alone)[0], results[0][0][i, valid])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_and_recomputation(recompute: bool) -> None:
    transformer = transformer_of("both", recompute=recompute)
    keypoints = random_keypoints((12, 20), (3, 0), slots=4)
    names, parameters = zip(*transformer.named_parameters(), strict=True)

    def run(tokens: Tensor, *parameters: Tensor) -> Tensor:
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(transformer, replaced, (tokens, keypoints))

    tokens = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (tokens, *parameters), fast_mode=True)
    assert "rotary.frequencies" in names


@pytest.mark.parametrize("position", ["both", "rotary", "none"])
def test_recorded_attention_is_that_of_rotated_heads(position: str) -> None:
    """The weights recorded, times the values, are what the block computes."""
    transformer = transformer_of(position)
    keypoints = random_keypoints((12, 20), (5, 0, 3))
    tokens = torch.randn(*keypoints.valid.shape, 8, dtype=torch.float64)
    inputs: list[Tensor] = []
    attention = transformer.blocks[0].attention
    handle = attention.register_forward_hook(lambda _m, args, output: inputs.extend([args[0], output]))
    with record_attention(transformer) as recorded:
        transformer(fill_padding(tokens, keypoints), keypoints)
    handle.remove()
    normed, output = inputs
    value = attention.qkv(normed).chunk(3, dim=-1)[2].unflatten(-1, (2, 4)).transpose(1, 2)
    mixed = attention.out((recorded[""][:, 0] @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed[keypoints.valid], output[keypoints.valid])


@pytest.mark.parametrize("position", ["both", "rotary", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(position: str, training: bool) -> None:
    torch.compiler.reset()
    layer = KAFLayer(4, **SMALL, position=position).train(training)
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for counts in [(7, 0, 4), (5, 5)]:
        keypoints = random_keypoints((12, 20), counts, dtype=torch.float32)
        features = torch.randn(len(counts), 4, 6, 10)
        actual, expected = compiled(features, keypoints), other(features, keypoints)
        torch.testing.assert_close(actual.features, expected.features)
        (actual.features.sum() + actual.tokens.sum()).backward()
        (expected.features.sum() + expected.tokens.sum()).backward()
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("position", ["both", "rotary", "none"])
def test_exports_with_dynamic_shapes(position: str) -> None:
    transformer = KeypointTransformer(8, depth=1, num_heads=2, position=position)
    keypoints = random_keypoints((12, 20), (7, 0, 4), dtype=torch.float32)
    d = Dim.DYNAMIC
    shapes = ({0: d, 1: d}, [{0: d, 1: d}] * 2 + [(d, d), None])
    arguments = (torch.randn(*keypoints.valid.shape, 8), keypoints)
    exported = torch.export.export(transformer, arguments, dynamic_shapes=shapes).module()
    keypoints = random_keypoints((32, 16), (3, 9), dtype=torch.float32)
    tokens = torch.randn(*keypoints.valid.shape, 8)
    torch.testing.assert_close(exported(tokens, keypoints), transformer(tokens, keypoints))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_computes_angles_in_single_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Of thousands of radians, which half precision cannot tell from those a turn away."""
    keypoints = random_keypoints((1200, 2000), (20, 15), dtype=torch.float32)
    transformer = KeypointTransformer(32, depth=2, position="rotary")
    with torch.no_grad():
        transformer.rotary.frequencies.mul_(100)
    tokens = torch.randn(*keypoints.valid.shape, 32)
    expected = transformer(tokens, keypoints)
    with torch.autocast("cpu", dtype):
        actual = transformer(tokens, keypoints)
    actual.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in transformer.parameters())
    assert (actual.float() - expected).norm() < tolerance * expected.norm()


def test_relative_positions_are_learned() -> None:
    """Which of two like keypoints lies left of a third, wherever they are: seen by rotations, not without positions."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(256, 1, 2, generator=generator) * 20
    right = torch.rand(256, generator=generator) < 0.5
    step = torch.where(
        right[:, None, None], torch.tensor([[[0.0, 0.0], [9.0, 0.0]]]), torch.tensor([[[9.0, 0.0], [0.0, 0.0]]])
    )
    keypoints = Keypoints(start + step, torch.ones(256, 2, dtype=torch.bool), (32, 32), padded=False)
    tokens = torch.eye(2, 8).expand(256, -1, -1)
    accuracy = {}
    for position in ("rotary", "none"):
        torch.manual_seed(0)
        transformer = KeypointTransformer(8, depth=1, num_heads=2, position=position)
        head = nn.Linear(8, 2)
        optimizer = torch.optim.Adam([*transformer.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(100):
            logits = head(transformer(tokens, keypoints)[:, 0])
            loss = F.cross_entropy(logits, right.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy[position] = (logits.argmax(1) == right).float().mean().item()
    assert accuracy["rotary"] > 0.95
    assert accuracy["none"] < 0.7


@pytest.mark.parametrize("position", ["rotary", "none", "both"])
def test_matcher_sees_positions_within_an_image(position: str) -> None:
    """Each image may be moved by a vector of its own."""
    torch.manual_seed(0)
    matcher = KeypointMatcher(8, depth=3, num_heads=2, position=position).double().eval()
    assert (None if matcher.rotary is None else len(matcher.rotary.frequencies)) == (None if position == "none" else 2)
    size = (60, 60)
    a, b = (random_keypoints((20, 30), counts, seed=i) for i, counts in enumerate([(5, 0), (4, 6)]))
    a, b = (Keypoints(kp.positions, kp.valid, size) for kp in (a, b))
    tokens = [torch.randn(*kp.valid.shape, 8, dtype=torch.float64) for kp in (a, b)]
    moved = [Keypoints(kp.positions + step, kp.valid, size) for kp, step in ((a, 13.0), (b, 4.0))]
    before = matcher(tokens[0], a, tokens[1], b).exp()
    after = matcher(tokens[0], moved[0], tokens[1], moved[1]).exp()
    assert ((before - after).abs().max() < 1e-12) == (position != "both")
    turned = Keypoints(a.positions.flip(-1), a.valid, size)
    assert ((matcher(tokens[0], turned, tokens[1], b).exp() - before).abs().max() > 1e-7) == (position != "none")


@pytest.mark.parametrize("position", POSITIONS)
def test_what_each_encoding_holds(position: str) -> None:
    transformer = KeypointTransformer(64, depth=2, position=position)
    names = [name for name, _ in transformer.named_parameters()]
    assert any(name.startswith("position_encoder.") for name in names) == (position in ("both", "absolute"))
    frequencies = [p.numel() for name, p in transformer.named_parameters() if "rotary" in name]
    assert frequencies == ([2 * 16] if position in ("both", "rotary") else [])


def test_the_option_reaches_every_layer() -> None:
    model = attach(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1)), {"0": 4}, position="rotary", **SMALL)
    assert (
        model.layers["0"].transformer.position
        == KAFLayer(4, position="rotary", **SMALL).transformer.position
        == "rotary"
    )
    assert KAFLayer(4, **SMALL).transformer.position == "both"
    assert KAFLayer(4, block="propagation", **SMALL).transformer.position == "absolute"


@pytest.mark.parametrize("held", POSITIONS)
@pytest.mark.parametrize("made", POSITIONS)
@pytest.mark.parametrize("kind", ["layer", "matcher"])
def test_state_dicts_of_another_encoding(kind: str, held: str, made: str) -> None:
    """A message names both, and how to load."""
    build = {"layer": lambda p: KAFLayer(8, position=p, **SMALL), "matcher": lambda p: KeypointMatcher(8, position=p)}[
        kind
    ]
    first, second = build(held), build(made)
    if held == made:
        second.load_state_dict(first.state_dict())
        return
    where = "transformer." if kind == "layer" else "the module"
    message = rf'position: the weights of {where} are of position="{held}", the module is of position="{made}"'
    with pytest.raises(RuntimeError, match=message):
        second.load_state_dict(first.state_dict())
    second.load_state_dict(first.state_dict(), strict=False)
    name = {"layer": "transformer.blocks.1.attention.out.weight", "matcher": "blocks.1.attention.out.weight"}[kind]
    assert second.get_parameter(name).equal(first.get_parameter(name))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"position must be one of .*'rotary'.*got position='relative'"):
        KAFLayer(4, position="relative")
    with pytest.raises(ValueError, match="position must be one of"):
        KeypointMatcher(8, position="relative")
    with pytest.raises(ValueError, match=r'position="rotary" and "both".*embed_dim / num_heads, got 3'):
        KAFLayer(4, embed_dim=12, num_heads=4, position="both")
    with pytest.raises(ValueError, match='position must be "absolute" with block="propagation"'):
        KeypointTransformer(8, block="propagation", position="rotary")
    keypoints = random_keypoints((12, 20), (3, 1))
    for position in ("rotary", "none"):
        transformer = transformer_of(position, dims=3)
        with pytest.raises(ValueError, match=r"spatial_dims=3.*image_size=\(12, 20\)"):
            transformer(torch.rand(2, 5, 8, dtype=torch.float64), keypoints)
        with pytest.raises(ValueError, match="tokens must have 8 channels"):
            transformer(torch.rand(2, 5, 4, dtype=torch.float64), keypoints)

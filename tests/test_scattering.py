import pytest
import torch
from common import fill_padding, random_keypoints
from torch import Tensor

from kaf_layer import Keypoints
from kaf_layer.scattering import KeypointScatter, cell_shares, scatter_keypoints

SIZES = [((9, 13), (9, 13)), ((17, 26), (5, 7)), ((6, 8, 10), (3, 4, 5))]
REDUCTIONS = {"mean": lambda t: t.mean(0), "sum": lambda t: t.sum(0), "amax": lambda t: t.amax(0)}


def naive(tokens: Tensor, keypoints: Keypoints, size: tuple[int, ...], reduce: str) -> Tensor:
    result = tokens.new_zeros(len(tokens), tokens.shape[2], *size)
    for b in range(len(tokens)):
        cells: dict[tuple[int, ...], list[Tensor]] = {}
        for n in range(tokens.shape[1]):
            if keypoints.valid[b, n]:
                position = reversed(keypoints.positions[b, n].tolist())
                cell = (
                    int((p + 0.5) * s / i // 1) for p, s, i in zip(position, size, keypoints.image_size, strict=True)
                )
                clamped = tuple(min(max(c, 0), s - 1) for c, s in zip(cell, size, strict=True))
                cells.setdefault(clamped, []).append(tokens[b, n])
        for cell, members in cells.items():
            result[(b, slice(None), *cell)] = REDUCTIONS[reduce](torch.stack(members))
    return result


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("image_size", "size"), SIZES)
def test_it_matches_a_naive_loop_with_its_gradient(image_size, size, reduce):
    kp = random_keypoints(image_size, (40, 0, 11))
    clean = torch.randn(3, 42, 4, dtype=torch.float64, requires_grad=True)
    actual = scatter_keypoints(fill_padding(clean, kp), kp, size, reduce=reduce)
    expected = naive(clean, kp, size, reduce)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)
    weight = torch.randn_like(actual)
    gradients = [torch.autograd.grad((a * weight).sum(), clean)[0] for a in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)


def test_the_gradient_of_a_tie_is_split_evenly():
    kp = Keypoints(torch.zeros(1, 4, 2), torch.tensor([[True, True, True, False]]), (2, 3))
    tokens = torch.tensor([[[5.0, 1.0], [5.0, 2.0], [4.0, 2.0], [9.0, 9.0]]], requires_grad=True)
    result = scatter_keypoints(tokens, kp, (2, 3), reduce="amax")
    assert result[0, :, 0, 0].tolist() == [5.0, 2.0]
    result.sum().backward()
    assert tokens.grad.tolist() == [[[0.5, 0.0], [0.5, 0.5], [0.0, 0.5], [0.0, 0.0]]]


def test_a_negative_maximum_is_kept():
    kp = Keypoints(torch.zeros(1, 2, 2), torch.ones(1, 2).bool(), (1, 2))
    tokens = torch.tensor([[[-3.0], [-2.0]]])
    assert scatter_keypoints(tokens, kp, (1, 2), reduce="amax").flatten().tolist() == [-2.0, 0.0]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_order_of_slots_does_not_matter(reduce):
    kp = random_keypoints((5, 4), (30, 12), dtype=torch.float32)
    tokens, order = torch.randn(2, 32, 3), torch.randperm(32)
    shuffled = Keypoints(kp.positions[:, order], kp.valid[:, order], kp.image_size)
    expected = scatter_keypoints(tokens, kp, (5, 4), reduce=reduce)
    torch.testing.assert_close(scatter_keypoints(tokens[:, order], shuffled, (5, 4), reduce=reduce), expected)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_garbage_reaches_neither_result_nor_gradient(reduce):
    kp = random_keypoints((6, 7), (5, 0))
    tokens = fill_padding(torch.randn(2, 7, 3, dtype=torch.float64), kp).requires_grad_()
    result = scatter_keypoints(tokens, kp, (6, 7), reduce=reduce)
    result.square().sum().backward()
    assert result.isfinite().all()
    assert result[1].eq(0).all()
    assert tokens.grad.masked_select(~kp.valid[..., None]).eq(0).all()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradcheck(reduce):
    kp = random_keypoints((4, 5), (6, 2))
    tokens = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: scatter_keypoints(t, kp, (2, 3), reduce=reduce), tokens)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_it_compiles_and_exports(reduce):
    kp = random_keypoints((8, 6), (5, 0), dtype=torch.float32)
    tokens, module = torch.randn(2, 7, 3), KeypointScatter(reduce)
    expected = module(tokens, kp, (4, 3))
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(tokens, kp, (4, 3)), expected)
    exported = torch.export.export(module, (tokens, kp, (4, 3))).module()
    torch.testing.assert_close(exported(tokens, kp, (4, 3)), expected)


def test_the_module_is_the_function():
    kp = Keypoints(torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), (4, 6))
    tokens = torch.tensor([[[1.0], [2.0], [6.0]]])
    cells = {reduce: KeypointScatter(reduce)(tokens, kp, (2, 3))[0, 0, 0, 0].item() for reduce in REDUCTIONS}
    assert cells == {"mean": 3.0, "sum": 9.0, "amax": 6.0}
    with pytest.raises(ValueError, match=r"reduce must be one of .* got reduce='max'"):
        KeypointScatter("max")


def test_more_samples_than_slots():
    kp = Keypoints(torch.full((5, 1, 2), 3.0), torch.ones(5, 1, dtype=torch.bool), (4, 4))
    tokens = torch.arange(5.0).view(5, 1, 1)
    for reduce in REDUCTIONS:
        assert scatter_keypoints(tokens, kp, (1, 2), reduce=reduce)[:, 0, 0].tolist() == [[0.0, i] for i in range(5)]


def test_a_slot_that_is_not_valid_joins_no_cell():
    """It counts as being in the first cell, beside a keypoint there, and must not tie that to the slot after it."""
    positions = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]])
    kp = Keypoints(positions, torch.tensor([[True, True, False]]), (4, 4))
    tokens = torch.tensor([[[2.0], [6.0], [9.0]]])
    for reduce in REDUCTIONS:
        assert scatter_keypoints(tokens, kp, (2, 2), reduce=reduce).flatten().tolist() == [2.0, 0.0, 0.0, 6.0]


def test_no_slots_give_a_zero_map():
    kp = Keypoints(torch.zeros(2, 0, 2), torch.zeros(2, 0).bool(), (4, 4))
    assert scatter_keypoints(torch.zeros(2, 0, 3), kp, (2, 2)).tolist() == torch.zeros(2, 3, 2, 2).tolist()


def test_what_does_not_fit_is_refused():
    kp = random_keypoints((8, 6), (5, 3))
    tokens = torch.zeros(2, 7, 3)
    with pytest.raises(ValueError, match=r"one for each slot.*tokens\.shape"):
        scatter_keypoints(tokens[:, :4], kp, (4, 3))
    with pytest.raises(ValueError, match="one entry for each axis"):
        scatter_keypoints(tokens, kp, (4, 3, 2))
    with pytest.raises(ValueError, match="reduce must be"):
        scatter_keypoints(tokens, kp, (4, 3), reduce="max")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduce", ["mean", "amax"])
def test_more_keypoints_in_a_cell_than_half_precision_can_count(reduce: str, dtype: torch.dtype) -> None:
    """Half precision counts to 256 or 2048: the keypoints of a cell are counted in single precision."""
    keypoints = random_keypoints((8, 8), (3000, 700), dtype=torch.float32)
    tokens = fill_padding(torch.ones(*keypoints.valid.shape, 2), keypoints).to(dtype).requires_grad_()
    shares = cell_shares(tokens, keypoints, keypoints.cells((1, 1)), (1, 1), reduce=reduce)
    assert shares.dtype == torch.float32  # a CPU counts in it anyway, a GPU in the type of the result
    scatter_keypoints(tokens, keypoints, (1, 1), reduce=reduce).sum().backward()
    shares = torch.where(keypoints.valid, 1 / torch.tensor([[3000.0], [700.0]]), 0.0)[..., None].expand(-1, -1, 2)
    torch.testing.assert_close(tokens.grad.float(), shares, rtol=0.01, atol=0)

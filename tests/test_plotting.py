"""What is drawn is where it belongs."""

import pytest
import torch
from common import random_keypoints

from kaf_layer import Keypoints, Matches
from kaf_layer.plotting import (
    COLORS,
    draw_attention,
    draw_image,
    draw_keypoints,
    draw_labels,
    draw_matches,
    draw_similarity,
    self_similarity,
)

figure = pytest.importorskip("matplotlib.figure", reason="plotting needs the extra plot")


@pytest.fixture
def axes():
    return figure.Figure().subplots()


def keypoints(positions: list[list[float]], valid: list[bool], size: tuple[int, int] = (8, 12)) -> Keypoints:
    return Keypoints(torch.tensor(positions), torch.tensor(valid), size)


def test_keypoints_are_drawn_at_their_pixels_and_padding_is_not(axes) -> None:
    sample = random_keypoints((9, 14), seed=3)[0]
    assert draw_keypoints(axes, None, sample) == 7
    drawn = torch.tensor(axes.collections[0].get_offsets().data)
    assert drawn.equal(sample.positions[sample.valid].double().float().to(drawn.dtype))


def test_the_image_lies_under_what_is_drawn_on_it(axes) -> None:
    image, sample = torch.rand(9, 14), random_keypoints((9, 14), seed=3)[0]
    draw_keypoints(axes, image, sample)
    assert axes.images[0].get_size() == (9, 14)
    draw_labels(axes, None, torch.ones(9, 14).long())
    assert len(axes.images) == 1


def test_a_sample_without_keypoints(axes) -> None:
    empty = random_keypoints((9, 14))[1]
    assert draw_keypoints(axes, torch.rand(9, 14), empty) == 0
    matches = Matches(torch.full((1, len(empty)), -1), torch.full((1, len(empty)), -1))
    assert draw_matches(axes, torch.rand(9, 14), empty, torch.rand(9, 14), empty, matches) == 0


def test_matches_join_partners_across_the_gap(axes) -> None:
    a = keypoints([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [True, True, False])
    b = keypoints([[7.0, 1.0], [0.0, 5.0]], [True, True], (8, 10))
    matches = Matches(torch.tensor([[1, -1, 0]]), torch.tensor([[2, 0]]))  # the last partner is padding
    assert draw_matches(axes, torch.rand(8, 12), a, torch.rand(8, 10), b, matches, gap=3) == 1
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1.0, 2.0], [12 + 3 + 0.0, 5.0]]
    assert axes.get_xlim() == (-0.5, 12 + 3 + 10 - 0.5)


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (16, 24)])
def test_self_similarity_is_the_cosine_with_the_query(size: tuple[int, int]) -> None:
    features, (row, column) = torch.randn(3, *size), (2, 1)
    # The centre of a cell, in pixels of the image.
    x, y = (column + 0.5) * 12 / size[1] - 0.5, (row + 0.5) * 8 / size[0] - 0.5
    result = self_similarity(features, (x, y), (8, 12))
    query = features[:, row, column].double()
    for i in range(size[0]):
        for j in range(size[1]):
            other = features[:, i, j].double()
            expected = (query @ other) / (query.norm() * other.norm())
            assert result[i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_self_similarity_in_three_dimensions() -> None:
    features = torch.randn(3, 4, 5, 6)
    assert self_similarity(features, (3.0, 2.0, 1.0), (4, 5, 6))[1, 2, 3].item() == pytest.approx(1, abs=1e-6)


def test_similarity_covers_the_image(axes) -> None:
    drawn = draw_similarity(axes, torch.rand(8, 12), torch.rand(2, 3), (4.0, 5.0))
    assert list(drawn.get_extent()) == [-0.5, 11.5, 7.5, -0.5]
    assert axes.lines[0].get_xydata().tolist() == [[4.0, 5.0]]


def test_attention_is_drawn_at_the_keypoints_and_averaged(axes) -> None:
    sample = keypoints([[1.0, 2.0], [float("nan")] * 2, [3.0, 4.0], [5.0, 6.0]], [True, False, True, True])
    weights = torch.zeros(2, 3, 4, 4)
    weights[:, :, 2] = torch.tensor([0.5, 0.0, 0.2, 0.3])
    weights[1, :, 2] = torch.tensor([0.7, 0.0, 0.2, 0.1])
    drawn = draw_attention(axes, torch.rand(8, 12), sample, weights, query=2)
    found = {tuple(p): v for p, v in zip(drawn.get_offsets().tolist(), drawn.get_array().tolist(), strict=True)}
    assert found == {(1.0, 2.0): pytest.approx(0.6), (3.0, 4.0): pytest.approx(0.2), (5.0, 6.0): pytest.approx(0.2)}
    assert drawn.get_offsets()[-1].tolist() == [1.0, 2.0]  # on top
    assert axes.lines[0].get_xydata().tolist() == [[3.0, 4.0]]
    one = draw_attention(figure.Figure().subplots(), torch.rand(8, 12), sample, weights[1, 0], query=2)
    assert sorted(one.get_array().tolist()) == pytest.approx([0.1, 0.2, 0.7])


@pytest.mark.parametrize("query", [-1, 1, 4])
def test_attention_of_what_is_no_keypoint_is_refused(axes, query: int) -> None:
    sample = keypoints([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0], [5.0, 6.0]], [True, False, True, True])
    with pytest.raises(ValueError, match=f"valid keypoint, got query={query} of 4 slots"):
        draw_attention(axes, torch.rand(8, 12), sample, torch.rand(4, 4), query)


def test_labels_and_images_of_any_kind(axes) -> None:
    labels = torch.zeros(8, 12, dtype=torch.uint8)
    labels[1:4, 2:5], labels[5:7, 6:9] = 1, 9  # more labels than colours
    assert draw_image(axes, torch.randint(0, 255, (8, 12), dtype=torch.uint8)).get_size() == (8, 12)
    assert draw_labels(axes, torch.rand(8, 12), labels) == [1, 9]
    assert draw_image(axes, torch.zeros(8, 12, dtype=torch.bfloat16)).get_size() == (8, 12)


def test_labels_are_filled_where_they_are(axes) -> None:
    labels = torch.zeros(8, 12, dtype=torch.long)
    labels[1:4, 2:5] = 3
    assert draw_labels(axes, None, labels, fill=0.5) == [3]
    inside, outline = axes.collections
    assert inside.get_alpha() == 0.5
    assert inside.get_facecolor()[0, :3].tolist() == outline.get_edgecolor()[0, :3].tolist()
    for part in (inside, outline):
        box = part.get_paths()[0].get_extents()
        assert [box.x0, box.y0, box.x1, box.y1] == [1.5, 0.5, 4.5, 3.5]
    assert len(set(COLORS)) == 7


def test_what_does_not_fit_is_refused(axes) -> None:
    batch = random_keypoints((8, 12))
    image, none = torch.rand(8, 12), torch.full((1, len(batch[0])), -1)
    with pytest.raises(ValueError, match=r"one slice and channel, got image.shape=torch.Size\(\[1, 8, 12\]\)"):
        draw_image(axes, image[None])
    with pytest.raises(ValueError, match="of one sample"):
        draw_keypoints(axes, image, batch)
    with pytest.raises(ValueError, match="one height"):
        draw_matches(axes, image, batch[0], torch.rand(9, 12), batch[0], Matches(none, none))
    with pytest.raises(ValueError, match="of one pair"):
        draw_matches(axes, image, batch[0], image, batch[0], Matches(none[:, 1:], none))
    with pytest.raises(ValueError, match=r"of the same keypoints, got weights.shape=torch.Size\(\[2, 3, 3\]\)"):
        draw_attention(axes, image, batch[0], torch.rand(2, 3, 3), 0)
    with pytest.raises(ValueError, match="each axis of the map"):
        self_similarity(torch.rand(3, 4, 6), (1.0, 2.0, 3.0), (8, 12))

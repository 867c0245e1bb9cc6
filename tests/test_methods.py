"""Pretraining methods: their losses against libraries and loops, what they are given, and that they learn."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import random_keypoints
from torch import Tensor

pytest.importorskip("examples.protocol.experiments.pretraining", reason="the extra train is not here")
from examples.protocol import files, pretrain  # after the skip
from examples.protocol.methods import METHODS, caid, glcl, pirl, rotation, simclr, ssl
from examples.protocol.methods.base import join
from examples.protocol.models.networks import build_model, weights_of
from examples.protocol.options import PretrainOptions, parse
from examples.protocol.training import augmentation
from examples.protocol.volumes.stacks import Stack, prepare
from examples.protocol.volumes.volume import Volume
from kaf_layer import GridDetector, Keypoints

SMALL = ["--patch", "48", "36", "--levels", "3", "--width", "8", "--embed-dim", "16", "--depth", "1", "--folds", "2"]


def options(*more: str) -> PretrainOptions:
    return parse(PretrainOptions, [*SMALL, "--output", "x", *more])


@pytest.fixture(scope="module")
def stacks() -> list[Stack]:
    """Four subjects of four slices of smooth patterns: half its place's, which subjects share, half the slice's own."""
    generator = torch.Generator().manual_seed(0)
    shared, *own = (torch.randn(1, 4, 7, 6, generator=generator) for _ in range(5))
    images = [2 * F.interpolate(shared + image, (48, 36), mode="bicubic")[0] for image in own]
    volumes = [Volume(image, torch.zeros_like(image).long(), f"s{i}") for i, image in enumerate(images)]
    return prepare(volumes, GridDetector(12), patch=(48, 36))


def embeddings(count: int, channels: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, generator=generator, requires_grad=True)


def same(ours: Tensor, theirs: Tensor, inputs: Tensor) -> None:
    """Equal in value and in gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, inputs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_simclr_is_nt_xent() -> None:
    """Our PCLLoss, where only views of one slice are positives, is pytorch-metric-learning's NT-Xent."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, numbers = embeddings(14), torch.tensor([0, 9, 3, 4, 100, 6, 8])
    ours = simclr.InstanceContrast(101, temperature=0.2)(*z.chunk(2), numbers)
    same(ours, losses.NTXentLoss(temperature=0.2)(z, numbers.repeat(2)), z)


def test_the_contrast_of_partitions_is_nt_xent_by_partition() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, partitions = embeddings(11), torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 2, 1, 0])
    ours = glcl.partition_contrast(z, partitions, temperature=0.1)
    same(ours, losses.NTXentLoss(temperature=0.1)(z, partitions), z)
    alone = glcl.partition_contrast(z, torch.zeros(11), temperature=0.1)  # without negatives
    alone.backward()
    assert alone == 0
    assert z.grad.isfinite().all()


def test_the_contrast_of_regions_is_nt_xent_within_an_image() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z = embeddings(2 * 3 * 5).view(2, 3, 5, 16)
    ours = glcl.region_contrast(*z, temperature=0.1)
    theirs = [losses.NTXentLoss(temperature=0.1)(z[:, i].flatten(0, 1), torch.arange(5).repeat(2)) for i in range(3)]
    same(ours, torch.stack(theirs).mean(), z)


def test_noise_contrast_is_the_papers_sum() -> None:
    z, numbers = F.normalize(embeddings(4).double(), dim=1), torch.tensor([5, 0, 2, 5])
    memory = F.normalize(torch.randn(6, 16, dtype=torch.float64), dim=1)
    terms = []
    for embedding, own in zip(z, numbers.tolist(), strict=True):
        weights = [torch.exp(embedding @ other / 0.3) for other in memory]
        shares = [weight / sum(weights) for weight in weights]
        terms.append(-sum(torch.log(h if j == own else 1 - h) for j, h in enumerate(shares)))
    ours = pirl.noise_contrast(z, memory.float(), numbers, temperature=0.3)
    torch.testing.assert_close(ours.double(), sum(terms) / 4, rtol=1e-5, atol=0)


def test_agreement_is_simsiams() -> None:
    p, z = embeddings(8), torch.randn(8, 16, requires_grad=True)
    oracle = torch.nn.CosineEmbeddingLoss()
    crossed = (oracle(p[:4], z[4:].detach(), torch.ones(4)) + oracle(p[4:], z[:4].detach(), torch.ones(4))) / 2 - 1
    same(caid.agreement(p, z), crossed, p)
    caid.agreement(p, z).backward()
    assert z.grad is None  # the other view is held fixed


def marked(keypoints: Keypoints) -> Tensor:
    """Images that hold each keypoint's slot, plus one, at its pixel."""
    height, width = keypoints.image_size
    images = torch.zeros(len(keypoints), 1, height, width)
    for sample in range(len(keypoints)):
        for slot in keypoints.valid[sample].nonzero()[:, 0].tolist():
            x, y = keypoints.positions[sample, slot].long().tolist()
            images[sample, 0, y, x] = slot + 1
    return images


def on_pixels(size: tuple[int, int]) -> Keypoints:
    """Keypoints at the centres of pixels of their own, and padded slots of garbage."""
    keypoints = random_keypoints(size, (9, 0, 5), dtype=torch.float32)
    cells = torch.stack([torch.randperm(size[0] * size[1])[: keypoints.valid.shape[1]] for _ in range(3)])
    positions = torch.stack([cells % size[1], cells // size[1]], dim=-1).float()
    return Keypoints(positions.where(keypoints.valid[..., None], torch.nan), keypoints.valid, size)


def seen(images: Tensor, keypoints: Keypoints) -> int:
    """Checks that valid keypoints are at their marks, and that no other mark is seen; how many there are."""
    assert tuple(images.shape[2:]) == keypoints.image_size
    torch.testing.assert_close(marked(keypoints), images)
    return int(keypoints.valid.sum())


def test_keypoints_turn_with_their_images() -> None:
    keypoints = on_pixels((13, 9))
    images, cut = rotation.middle(marked(keypoints), keypoints)
    assert images.shape[2:] == (9, 9)
    count = seen(images, cut)
    assert 0 < count < keypoints.valid.sum()  # some were above or below
    turned = [rotation.turn(images, cut, times) for times in range(4)]
    assert all(seen(*each) == count for each in turned)
    assert turned[1][0][0, 0, 0].equal(images[0, 0, :, -1])  # against the clock: the right column becomes the top row
    joined = join([moved for _, moved in turned])
    assert joined[3 + 2].positions.equal(turned[1][1][2].positions)


def test_each_image_turns_by_itself_with_its_keypoints() -> None:
    keypoints = on_pixels((9, 9))
    images, turns = marked(keypoints), torch.tensor([3, 0, 1])
    turned, moved = ssl.turn_each(images, keypoints, turns)
    assert seen(turned, moved) == keypoints.valid.sum()
    assert turned[0, 0].equal(images[0, 0].T.flip(1))  # three quarters against the clock are one with it
    assert turned[2, 0].equal(images[2, 0].T.flip(0))


def test_a_share_of_each_image_is_cut_out() -> None:
    torch.manual_seed(0)
    images = 1 + torch.rand(20, 2, 24, 36)
    cut = ssl.cut_out(images)
    hidden = (cut == 0).all(1)
    assert cut.equal(images.where(~hidden[:, None], 0.0))  # the rest is as it was
    shares = hidden.float().mean((1, 2))
    assert shares.min() >= 0.3
    assert shares.max() < 0.3 + 1 / 9  # the last rectangle is a third of each side at most
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 20
    # Whole rectangles: a hidden pixel has a hidden neighbour in each direction.
    along = [hidden & (hidden.roll(1, axis) | hidden.roll(-1, axis)) for axis in (1, 2)]
    assert all(mask.equal(hidden) for mask in along)


def test_the_three_losses_of_swin_unetrs_pretraining(stacks: list[Stack]) -> None:
    """Inpainting and rotation against loops, the contrast against pytorch-metric-learning's NT-Xent."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    chosen = options("--model", "kaf-unet", "--method", "ssl", "--temperature", "0.2")
    samples = METHODS["ssl"].samples(stacks, chosen)
    method = METHODS["ssl"](build_model(chosen), samples, chosen)
    samples = samples[::3]
    inputs = method.draw(method.batch_of(samples), augmentation.Augmentation())
    images, keypoints, originals, turns, _ = inputs
    assert images.shape == originals.shape == (2 * len(samples), 1, 36, 36)
    found = method(*inputs)
    features = method.encoder(images, keypoints).features[-1]
    painted, vectors = method.decoder(features), features.mean((2, 3))
    differences = [abs(a - b) for a, b in zip(painted.flatten().tolist(), originals.flatten().tolist(), strict=True)]
    assert found["inpainting"].item() == pytest.approx(sum(differences) / len(differences), rel=1e-4)
    likelihoods = method.turn_head(vectors).softmax(1)
    surprise = [-row[turn].log().item() for row, turn in zip(likelihoods, turns.tolist(), strict=True)]
    assert found["rotation"].item() == pytest.approx(sum(surprise) / len(surprise), rel=1e-4)
    pairs = torch.arange(len(samples)).repeat(2)
    expected = losses.NTXentLoss(temperature=0.2)(method.projector(vectors), pairs)
    assert found["contrast"].item() == pytest.approx(expected.item(), rel=1e-4)
    parts = [found[name].item() for name in ("inpainting", "rotation", "contrast")]
    assert found["loss"].item() == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize("divisor", [1, 4])
def test_pieces_of_a_jigsaw_have_their_keypoints(divisor: int) -> None:
    keypoints = on_pixels((26, 39))
    images = marked(keypoints)
    pieces, moved = pirl.cut(images, keypoints, divisor)
    height, width = (8, 13) if divisor == 1 else (8, 12)
    assert pieces.shape == (27, 1, height, width)
    for sample, row, column in ((0, 0, 0), (0, 1, 2), (2, 2, 1)):
        expected = images[sample, :, row * 8 :, column * 13 :][:, :height, :width]
        assert pieces[9 * sample + 3 * row + column].equal(expected)
    assert 0 < seen(pieces, moved) <= keypoints.valid.sum()
    with pytest.raises(ValueError, match="need a --patch of 48 pixels or more"):
        pirl.cut(images, keypoints, 16)


def test_regions_are_those_of_both_maps() -> None:
    maps = torch.randn(2, 3, 14, 17)
    one, other = glcl.regions(maps, 2 * maps)
    assert one.shape == (2, 13, 9 * 3)
    assert other.equal(2 * one)
    blocks = [maps[0, :, i : i + 3, j : j + 3].flatten() for i in range(0, 12, 3) for j in range(0, 15, 3)]
    assert all(any(region.equal(block) for block in blocks) for region in one[0])
    assert len(one[0].unique(dim=0)) == 13


@pytest.mark.parametrize(("levels", "blocks"), [("3", 1), ("5", 3)])
def test_glcl_pretrains_the_decoder_but_not_its_last_block(levels: str, blocks: int) -> None:
    chosen = options("--model", "kaf-unet", "--method", "glcl", "--levels", levels, "--patch", "48", "32")
    network = build_model(chosen)
    method = METHODS["glcl"](network, [], chosen)
    images, keypoints = torch.randn(2, 1, 48, 32), random_keypoints((48, 32), (4, 0), dtype=torch.float32)
    maps: list[Tensor] = []
    network.decoder.blocks[-2].register_forward_hook(lambda _, __, output: maps.append(output))
    network.eval()
    network(images, keypoints)
    assert method.decode(network.encoder(images, keypoints).features).equal(maps[0])
    learnt = {name.rsplit(".", 1)[0] for name in weights_of(network, method.parts()) if name.startswith("decoder")}
    assert {int(name.split(".")[2]) for name in learnt} == set(range(blocks))
    with pytest.raises(ValueError, match="got --model fcn; try glcl-global"):
        METHODS["glcl"](build_model(options("--model", "fcn")), [], options("--model", "fcn"))


def test_the_local_contrast_gives_the_encoder_no_gradient(stacks: list[Stack]) -> None:
    chosen = options("--model", "unet", "--method", "glcl")
    method = METHODS["glcl"](build_model(chosen), [], chosen)
    samples = method.samples(stacks, chosen)[:4]
    batch = method.draw(method.batch_of(samples), augmentation.Augmentation())
    images, keypoints, partitions = batch
    assert images.shape[0] == len(keypoints) == 12
    assert partitions.tolist() == [0, 1, 2, 3] * 2
    method(images, keypoints, torch.arange(8))["loss"].backward()  # no positives: no global contrast
    assert all(not p.grad.any() for p in method.encoder.parameters())
    assert any(p.grad.any() for p in method.blocks.parameters())


def test_the_memory_moves_halfway() -> None:
    chosen = options("--model", "unet", "--method", "pirl")
    method = METHODS["pirl"](build_model(chosen), range(5), chosen)
    before = method.memory.clone()
    new = F.normalize(torch.randn(2, 16), dim=1)
    method.remember(new, torch.tensor([3, 1]))
    torch.testing.assert_close(method.memory[3], F.normalize(before[3] + new[0], dim=0))
    assert method.memory[[0, 2, 4]].equal(before[[0, 2, 4]])
    assert "memory" in method.state_dict()  # a resumed run goes on with it


@pytest.mark.parametrize(
    ("model", "edge", "names"),
    [
        ("kaf-unet", "48", ("simclr", "rotation", "pirl", "glcl-global", "glcl", "caid")),
        ("kaf-fcn", "48", ("rotation",)),
        ("unet-c2", "48", ("glcl",)),
        ("swin-unet", "32", ("simclr", "caid")),
        ("swin-unetr", "32", ("pcl", "ssl")),
    ],
)
def test_methods_train_all_of_an_encoder(stacks: list[Stack], model: str, edge: str, names: tuple[str, ...]) -> None:
    """What a method trains has a gradient, and is in the network by the same name."""
    square = prepare([stack.volume for stack in stacks], GridDetector(12), patch=(int(edge), int(edge)))
    for name in names:
        chosen = options("--model", model, "--method", name, "--patch", edge, edge)
        network = build_model(chosen)
        samples = METHODS[name].samples(square, chosen)
        method = METHODS[name](network, samples, chosen)
        method(*method.draw(method.batch_of(samples[::5]), augmentation.Augmentation()))["loss"].backward()
        missing = [key for key, parameter in method.named_parameters() if parameter.grad is None]
        assert not missing, (name, missing[:3])
        learnt = weights_of(network, method.parts())
        assert learnt.keys() <= network.state_dict().keys()
        assert len(learnt) == sum(len(part.state_dict()) for part in method.parts())


# Where a method ends that has learnt something: below what chance gives, or the images' own variance.
CHANCE = {
    "pcl": 2.398,
    "simclr": 2.398,
    "rotation": 1.386,
    "pirl": 3.014,
    "glcl-global": 2.0,
    "glcl": 2.0,
    "caid": 20.0,
    "ssl": 2.0 + 1.386 + 2.398,
}


@pytest.mark.parametrize("name", CHANCE)
def test_methods_learn(stacks: list[Stack], tmp_path: Path, name: str) -> None:
    recipe = ["--model", "unet", "--optimizer", "adam", "--lr", "0.01", "--epochs", "8", "--steps-per-epoch", "5"]
    recipe += ["--batch", "6", "--save-every", "8", "--method", name, "--output", str(tmp_path)]
    longer = ["--epochs", "16", "--lr", "0.003"] if name in ("pirl", "ssl") else []  # whose heads begin far off
    pretrain.main([*SMALL, *recipe, *longer], stacks=stacks)
    losses = files.load(tmp_path / "checkpoint.pt")["losses"]
    assert sum(losses[-3:]) / 3 < 0.96 * CHANCE[name], losses

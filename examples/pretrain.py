"""Pretraining without labels on one page: the paper's losses (Eq. 3) on pairs of neighbouring slices.

python examples/pretrain.py --steps 100 --output encoder.pt
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from kornia.augmentation import RandomAffine, RandomGamma
from monai.data import create_test_image_3d
from torch import Tensor, nn

from kaf_layer import KAFEncoder, KAFLayer, KAFPretrainingLoss, KeypointAugmentation, SIFTDetector, match_keypoints


def volume(subject: int) -> Tensor:
    """A synthetic volume (32, 1, 96, 80) with values in [0, 1]: put your own unlabelled data here."""
    draw = np.random.RandomState(subject)
    image, _ = create_test_image_3d(96, 80, 32, num_objs=24, rad_max=12, random_state=draw)
    return torch.from_numpy(image).movedim(-1, 0)[:, None].float()


def pairs(volumes: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Slices (2 count, 1, H, W), where i and i + count are neighbours, and their positions in the volume, 0 to 1."""
    chosen = [volumes[i] for i in torch.randint(len(volumes), (count,))]
    at = torch.tensor([int(torch.randint(len(slices) - 1, ())) for slices in chosen])
    images = [slices[i + step] for step in (0, 1) for slices, i in zip(chosen, at.tolist(), strict=True)]
    lengths = torch.tensor([len(slices) for slices in chosen])
    return torch.stack(images), torch.cat([at / lengths, (at + 1) / lengths])


def main(steps: int, output: Path, *, batch: int = 4) -> None:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(c, 32, 3, stride=2, padding=1), nn.ReLU()) for c in (1, 64, 64)]
    encoder = KAFEncoder(stages, [KAFLayer(32, embed_dim=64, depth=2), KAFLayer(32, embed_dim=64, depth=2), None])
    criterion = KAFPretrainingLoss(32, token_channels=2 * 64)
    optimizer = torch.optim.Adam([*encoder.parameters(), *criterion.parameters()], lr=1e-3)
    detector = SIFTDetector(max_keypoints=128, contrast_threshold=0.02)
    augment = KeypointAugmentation(RandomAffine(15.0, padding_mode="reflection"), RandomGamma((0.8, 1.2)))
    volumes = [volume(subject) for subject in range(6)]
    history: list[Tensor] = []
    for step in range(1, steps + 1):
        images, positions = pairs(volumes, batch)
        keypoints = detector(images)
        matches = match_keypoints(keypoints[:batch], keypoints[batch:])
        images, keypoints, _ = augment(images, keypoints)
        matches = matches.among(keypoints[:batch], keypoints[batch:])  # without keypoints that have left the image
        features, tokens = encoder(images, keypoints)
        losses = criterion(features[-1], positions, tokens, keypoints, matches)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.total.detach())
        if step % 20 == 0:
            print(f"step {step}: loss {torch.stack(history[-20:]).mean():.3f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(encoder.state_dict(), output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("encoder.pt"), help="the encoder's weights")
    main(**vars(parser.parse_args()))

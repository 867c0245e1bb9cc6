"""Adds KAF layers to a trained MONAI UNet in three lines; MONAI's loss and sliding window work as before.

python examples/attach_monai.py --steps 50
"""

import argparse

import numpy as np
import torch
from monai.data import create_test_image_2d
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn

from kaf_layer import SIFTDetector
from kaf_layer.interop import KAFBackbone, attach


def slices(subject: int) -> tuple[Tensor, Tensor]:
    """Synthetic normalised images (4, 1, 96, 80) and their labels: put your own data here."""
    draw = np.random.RandomState(subject)
    drawn = [create_test_image_2d(96, 80, num_seg_classes=3, rad_max=15, random_state=draw) for _ in range(4)]
    images, labels = (torch.from_numpy(np.stack(arrays))[:, None].float() for arrays in zip(*drawn, strict=True))
    return (images - images.mean()) / images.std(), labels


def train(model: nn.Module, steps: int) -> float:
    """Trains the parameters that require gradients, and returns the loss of the last step."""
    images, labels = slices(0)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = torch.tensor(torch.nan)
    for _ in range(steps):
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def insert_layers(unet: UNet) -> KAFBackbone:
    """The three lines: the names of submodules (``unet.named_modules()`` lists them), the detector, and attach."""
    names = {"model.0": 16, "model.1.submodule.0": 32}
    detector = SIFTDetector(max_keypoints=128, contrast_threshold=0.02, descriptors=False)
    return attach(unet, names, detector=detector, depth=2, embed_dim=64)


def main(steps: int = 50) -> None:
    torch.manual_seed(0)
    unet = UNet(spatial_dims=2, in_channels=1, out_channels=4, channels=(16, 32, 64), strides=(2, 2))
    print(f"UNet: loss {train(unet, steps):.3f} after {steps} steps")
    checkpoint = {name: value.clone() for name, value in unet.state_dict().items()}
    images, _ = slices(1)
    with torch.no_grad():
        before = unet.eval()(images)

    model = insert_layers(unet)
    with torch.no_grad():
        print("identical to the UNet before training:", torch.equal(model(images), before))

    model.backbone.requires_grad_(False)
    loss = train(model.train(), steps)
    print(f"KAF layers after stages of the frozen UNet: loss {loss:.3f} after {steps} more steps")

    with torch.no_grad():  # each window has its own keypoints
        logits = sliding_window_inference(images, (64, 64), sw_batch_size=4, predictor=model.eval())
    print("sliding window:", tuple(logits.shape))

    unet.load_state_dict(checkpoint)
    with torch.no_grad():
        print("identical to the UNet after removing the layers:", torch.equal(model.remove_layers()(images), before))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of each training")
    main(parser.parse_args().steps)

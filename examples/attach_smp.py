"""Adds KAF layers after the first encoder stages of a segmentation-models-pytorch UNet, for images of four channels.

python examples/attach_smp.py
"""

import examples.torchvision_operators  # noqa: F401  # only needed beside a CPU build of torch

# isort: split
import segmentation_models_pytorch as smp
import torch

from kaf_layer import SIFTDetector, attach


def main() -> None:
    unet = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=3).eval()
    images = torch.rand(2, 4, 96, 128)  # four modalities, whose mean is used to detect keypoints
    labels = torch.randint(3, (2, 96, 128))
    with torch.no_grad():
        before = unet(images)

    detector = SIFTDetector(max_keypoints=128, contrast_threshold=0.02, descriptors=False)
    names = {"encoder.layer1": 64, "encoder.layer2": 128}
    model = attach(unet, names, detector=detector, embed_dim=64, depth=2)
    with torch.no_grad():
        print("identical before training:", torch.equal(model(images), before))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = smp.losses.DiceLoss("multiclass")(model.train()(images), labels)
    loss.backward()
    optimizer.step()
    print(f"a training step: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()

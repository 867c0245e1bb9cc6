"""Adds KAF layers after stages of a timm classifier, which may be any convolutional network or Swin Transformer.

python examples/attach_timm.py --model swin_tiny_patch4_window7_224
"""

import argparse

import examples.torchvision_operators  # noqa: F401  # only needed beside a CPU build of torch

# isort: split
import timm
import torch

from kaf_layer import SIFTDetector, attach


def main(name: str = "resnet18") -> None:
    backbone = timm.create_model(name, pretrained=False, num_classes=2).eval()  # pretrained=True downloads weights
    images = torch.rand(2, *backbone.default_cfg["input_size"])
    with torch.no_grad():
        before = backbone(images)

    stages = [stage["module"] for stage in backbone.feature_info[:2]]
    detector = SIFTDetector(max_keypoints=128, contrast_threshold=0.02, descriptors=False)
    model = attach(backbone, stages, detector=detector, example=images, embed_dim=64, depth=2)
    print({name: layer.in_channels for name, layer in zip(stages, model.layers.values(), strict=True)})

    with torch.no_grad():
        print("identical before training:", torch.equal(model(images), before))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = torch.nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    print(f"a training step: loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name from timm.list_models()")
    main(parser.parse_args().model)

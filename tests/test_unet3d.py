"""examples/unet3d.py: every parameter learns, keypoints reach the logits, thick slices, sizes."""

import runpy
from pathlib import Path

import pytest
import torch
from common import random_keypoints

pytest.importorskip("monai")

from examples.unet3d import KAFUNet3d, Repeat, UNet3d, UNet3dC2

SIZE = (8, 16, 24)
SMALL = {"embed_dim": 16, "depth": 1}
KEYPOINTS = random_keypoints(SIZE, (9, 0), dtype=torch.float32)
NETWORKS = {
    "unet": lambda: UNet3d(1, 3, width=4),
    "unet-c2": lambda: UNet3dC2(1, 3, width=4),
    "kaf-unet": lambda: KAFUNet3d(1, 3, width=4, **SMALL),
    "kaf-unet-add": lambda: KAFUNet3d(1, 3, width=4, fusion="add", **SMALL),
    "one-layer": lambda: UNet3d(1, 3, width=4, layers=[None, Repeat(8), None]),
    "thick": lambda: KAFUNet3d(1, 3, width=4, strides=[(1, 2, 2), 2], **SMALL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_in_every_parameter(name: str) -> None:
    network = NETWORKS[name]()
    logits = network(torch.rand(2, 1, *SIZE), KEYPOINTS)
    assert logits.shape == (2, 3, *SIZE)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_keypoints_reach_the_logits() -> None:
    volumes = torch.rand(2, 1, *SIZE)
    network = KAFUNet3d(width=4, **SMALL).eval()
    assert not torch.allclose(network(volumes, KEYPOINTS)[0], network(volumes, KEYPOINTS.resize(SIZE)[[1, 0]])[0])
    with pytest.raises(ValueError, match="keypoints=None"):
        network(volumes)


def test_c2_has_the_convolutions_of_the_kaf_unet() -> None:
    def shapes(network: torch.nn.Module) -> list[torch.Size]:
        return [p.shape for name, p in network.named_parameters() if ".layers." not in name]

    assert shapes(UNet3dC2(width=4)) == shapes(KAFUNet3d(width=4, **SMALL))


def test_a_volume_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"divisible by \[8, 8, 8\], got volumes.shape="):
        UNet3d(width=4)(torch.rand(1, 1, 8, 16, 20))
    assert UNet3d(width=4, strides=[(1, 2, 2), 2])(torch.rand(1, 1, 6, 16, 20)).shape == (1, 4, 6, 16, 20)


def test_the_script_runs_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "unet3d.py"), run_name="__main__")
    assert capsys.readouterr().out.count("parameters, logits (1, 4, 12, 48, 40)") == 3

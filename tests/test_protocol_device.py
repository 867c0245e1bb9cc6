"""On a device the protocol draws its random numbers there, and nothing waits for a copy: rehearsed on "meta"."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("examples.protocol.experiments.pretraining", reason="the extra train is not here")
from examples.protocol.methods import METHODS
from examples.protocol.models.networks import build_model
from examples.protocol.options import PretrainOptions, parse
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.batches import Batches, collate, slices_of
from examples.protocol.volumes.stacks import Stack, prepare
from examples.protocol.volumes.volume import Volume
from kaf_layer import GridDetector, Keypoints

SMALL = ["--patch", "48", "48", "--levels", "3", "--width", "4", "--embed-dim", "8", "--depth", "1", "--output", "x"]
META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Notes copies from the CPU that would wait for the device, and draws on the CPU. A value asked for is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        moved = isinstance(result, Tensor) and result.is_meta and any(isinstance(a, Tensor) and a.is_cpu for a in args)
        waits = name in ("_to_copy", "copy_") and moved and not kwargs.get("non_blocking", False)
        drawn = isinstance(result, Tensor) and result.is_cpu and name in ("rand", "uniform_", "randint", "randperm")
        drawn = drawn and "generator" not in str(func)  # the numbers of a batch's samples have their own generator
        if waits or drawn:
            self.found.append(str(func))
        return result


class Still(nn.Module):
    """In the place of Kornia's transform, which copies its few numbers without waiting only to a real GPU."""

    def forward(self, images: Tensor, keypoints: Keypoints, labels: Tensor | None = None) -> Any:
        return images, keypoints, labels


@pytest.fixture(scope="module")
def stacks() -> list[Stack]:
    image = torch.rand(4, 48, 48, generator=torch.Generator().manual_seed(0))
    return prepare([Volume(image, (image > 0.5).long(), "a")], GridDetector(12), patch=(48, 48))


def still() -> Augmentation:
    augment = Augmentation(drop_keypoints=0.5)
    augment.move = Still()
    return augment


def test_batches_reach_the_device_and_are_augmented_there(stacks: list[Stack]) -> None:
    batches = Batches(slices_of(stacks), collate, size=3, device=META)
    with Waits() as waits:
        for batch in batches.epoch(2, seed=0):
            images, keypoints, labels = still()(*batch)
            assert images.is_meta
            assert keypoints.valid.is_meta
            assert labels.is_meta
    assert waits.found == []


# "ssl" draws its holes one by one on the CPU, and copies their mask without waiting.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "ssl"])
def test_methods_draw_on_the_device(name: str, stacks: list[Stack]) -> None:
    options = parse(PretrainOptions, [*SMALL, "--method", name, "--model", "unet"])
    samples = METHODS[name].samples(stacks, options)
    method = METHODS[name](build_model(options), samples, options)
    batches = Batches(samples, method.batch_of, size=3, device=META)
    (batch,) = batches.epoch(1, seed=0)
    with Waits() as waits:
        inputs = method.draw(batch, still())
    assert waits.found == []
    assert all(value.is_meta for value in inputs if isinstance(value, Tensor))


def test_the_rehearsal_sees_what_waits() -> None:
    with Waits() as waits:
        torch.rand(3).to(META)
        torch.ones(3).to(META, non_blocking=True)
    assert len(waits.found) == 2

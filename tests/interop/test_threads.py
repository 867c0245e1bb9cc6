"""One model in many threads: a pass belongs to its thread, and to the replica that it runs."""

import copy
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from common import random_keypoints
from torch import Tensor, nn

from kaf_layer import GridDetector, Keypoints, SIFTDetector
from kaf_layer.interop import KAFBackbone, attach

SMALL = {"embed_dim": 8, "depth": 1, "num_heads": 2, "hidden_channels": 4}
IMAGES = torch.rand(24, 1, 1, 24, 32, generator=torch.Generator().manual_seed(0))
CALLS = 400


class Parallel(nn.Module):
    """Submodules in one pass, between which threads take turns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def model(detector: Any = None) -> KAFBackbone:
    built = attach(Parallel(), {"a": 8, "b": 4}, detector=detector or SIFTDetector(16, descriptors=False), **SMALL)
    for layer in built.layers.values():
        nn.init.normal_(layer.gain)
    return built.eval()


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@torch.no_grad()
def test_hundreds_of_calls_from_threads_are_right() -> None:
    images = nn.functional.avg_pool2d(torch.rand(24, 1, 72, 96), 3)[:, None]
    network = model()
    expected = [network(image) for image in images]
    assert not all(torch.equal(a, network.backbone(i)) for a, i in zip(expected, images, strict=True))
    keypoints = [network.detector(image) for image in images]

    @torch.no_grad()
    def call(index: int) -> bool:
        sample = index % len(images)
        given = {"keypoints": keypoints[sample]} if index % 2 else {}  # detected or given, in turn
        return torch.equal(network(images[sample], **given), expected[sample])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(CALLS)))


def test_the_network_alone_beside_the_model() -> None:
    """A thread that calls the backbone by itself gets no layers, whatever other threads do."""
    network = model(GridDetector(6))
    with torch.no_grad():
        fused, plain = network(IMAGES[0]), network.backbone(IMAGES[0])
    assert not torch.equal(fused, plain)

    @torch.no_grad()
    def call(index: int) -> bool:
        return torch.equal(network.backbone(IMAGES[0]), plain) if index % 2 else torch.equal(network(IMAGES[0]), fused)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(200)))


def test_an_error_in_one_thread_is_no_other_threads() -> None:
    network = model(GridDetector(6))
    with torch.no_grad():
        expected = network(IMAGES[0])

    @torch.no_grad()
    def call(index: int) -> bool:
        if index % 3:
            return torch.equal(network(IMAGES[0]), expected)
        with pytest.raises(ValueError, match="keypoints must be of the images"):
            network(IMAGES[0], keypoints=random_keypoints((20, 20), (3,), dtype=torch.float32))
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(150)))


def replica(network: nn.Module, *, scale: float) -> nn.Module:
    """As ``nn.parallel.replicate`` makes one: hooks and everything else shared but modules and weights."""
    made = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, copied in made.items():
        for name, child in module._modules.items():
            setattr(copied, name, made[child])
        for name, value in module._parameters.items():
            setattr(copied, name, None if value is None else value * scale)
        for name, value in module._buffers.items():
            copied._buffers[name] = None if value is None else value.clone()
    return made[network]


def test_replicas_use_their_own_weights_and_pass() -> None:
    """nn.DataParallel runs replicas of a model, which share its hooks, in a thread each."""
    network = model(GridDetector(6))
    scales = [1.0, 0.5, -1.0, 2.0]
    expected = []
    for scale in scales:
        other = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(scale)
        expected.append(other(IMAGES[0]))
    barrier = Barrier(len(scales))

    def call(scale: float) -> list[Tensor]:
        made = replica(network, scale=scale)
        barrier.wait(10)
        return [made(IMAGES[0]) for _ in range(25)]

    with ThreadPoolExecutor(len(scales)) as threads:
        for outputs, right in zip(threads.map(call, scales), expected, strict=True):
            for output in outputs:
                torch.testing.assert_close(output, right, atol=0, rtol=0)
    made = replica(network, scale=0.5)
    made(IMAGES[0]).sum().backward()  # gradients reach the model's weights
    assert all(p.grad is not None for p in network.parameters())


def test_data_parallel_on_one_device() -> None:
    network = model(GridDetector(6))
    assert torch.equal(nn.DataParallel(network)(IMAGES[0]), network(IMAGES[0]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda built: pickle.loads(pickle.dumps(built))])
def test_copies_have_a_pass_of_their_own(duplicate: Any) -> None:
    network = model(GridDetector(6))
    network._pass.fused = ("a",)
    other = duplicate(network)
    assert other._pass is not network._pass
    assert other._pass.fused == ()
    assert all(hook.state is other._pass for m in other.backbone.modules() for hook in m._forward_hooks.values())


def test_a_network_that_calls_itself_is_refused() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] > 16:
                outer(x[..., :16], keypoints=Keypoints(torch.zeros(1, 1, 2), torch.ones(1, 1).bool(), (24, 16)))
            return self.conv(x)

    outer = attach(Recursive(), {"conv": 2}, detector=GridDetector(6), **SMALL)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another forward pass is under way around this one"):
            outer(IMAGES[0])
    outer(IMAGES[0][..., :16])

"""The auxiliary loss on tokens, and attention that all scales share: two options of the protocol."""

from pathlib import Path

import pytest
import torch
from common import random_keypoints
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("monai", reason="the extra train is not here")

from examples.protocol.models.networks import build_model
from examples.protocol.models.token_loss import WithTokenLogits, token_loss
from examples.protocol.options import Options, parse
from kaf_layer import KAFLayer, Keypoints

NETWORK = [
    "--output",
    "unused",
    "--patch",
    "16",
    "24",
    "--width",
    "4",
    "--levels",
    "3",
    "--depth",
    "1",
    "--embed-dim",
    "8",
]


def naive(logits: list[Tensor], keypoints: Keypoints, labels: Tensor) -> Tensor:
    losses = []
    for layer in logits:
        terms = []
        for b, n in keypoints.valid.nonzero().tolist():
            x, y = keypoints.positions[b, n].clamp(min=0).round().long().tolist()
            terms.append(-F.log_softmax(layer[b, n], 0)[labels[b, min(y, 15), min(x, 23)]])
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


def test_token_loss_is_the_mean_over_keypoints() -> None:
    keypoints = random_keypoints((16, 24), (7, 0, 4))
    labels = torch.randint(3, (3, 16, 24))
    logits = [torch.randn(*keypoints.valid.shape, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = token_loss(logits, keypoints, labels)
    torch.testing.assert_close(loss, naive(logits, keypoints, labels))
    loss.backward()
    assert all((x.grad[~keypoints.valid] == 0).all() for x in logits)
    assert token_loss(logits, random_keypoints((16, 24), (0, 0, 0), slots=9), labels) == 0


def test_tokens_learn_their_classes() -> None:
    """The tokens are those that the layers return, and the network's own logits stay what they are."""
    network = build_model(parse(Options, [*NETWORK, "--classes", "2"]))
    learner = WithTokenLogits(network, 8, 2)
    keypoints = random_keypoints((16, 24), (7, 5), dtype=torch.float32)
    images, labels = torch.rand(2, 1, 16, 24), torch.randint(2, (2, 16, 24))
    torch.testing.assert_close(learner.eval()(images, keypoints).pixels, network(images, keypoints))
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = token_loss(learner.train()(images, keypoints).tokens, keypoints, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_shared_attention() -> None:
    models = [build_model(parse(Options, [*NETWORK, *more])) for more in ([], ["--share-attention"])]
    layers = [[m for m in model.modules() if isinstance(m, KAFLayer)] for model in models]
    assert [len({id(layer.transformer) for layer in each}) for each in layers] == [2, 1]
    assert [len({id(layer.embed) for layer in each}) for each in layers] == [2, 2]
    own, shared = (count(model) for model in models)
    assert own - shared == count(layers[0][0].transformer)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-loss", "-1"], "--token-loss must be a weight of 0 or more, got -1.0"),
        (
            ["--token-loss", "0.5", "--model", "unet"],
            "--token-loss needs --model kaf-unet and --spatial-dims 2, got unet and 2",
        ),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse(Options, [*options, "--output", str(tmp_path)])

"""Weights to share: on the Hugging Face Hub, as a MONAI bundle; and the how-to pages' code."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from common import random_keypoints
from torch import Tensor, nn

from examples.fcn import KAFFCN
from examples.unet import KAFUNet
from kaf_layer import GridDetector, KAFLayer, attach

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "bundle" / "configs"
MODELS = ROOT / "examples" / "bundle" / "models"
SUNNYBROOK = ROOT.parent / "shared" / "data" / "sunnybrook"
KEYPOINTS = random_keypoints((32, 48), (9, 0), dtype=torch.float32)


@pytest.mark.parametrize(
    ("base", "arguments", "shape"),
    [
        (KAFLayer, {"in_channels": 8, "embed_dim": 16, "depth": 1, "fusion": "add"}, (2, 8, 16, 24)),
        (KAFUNet, {"num_classes": 3, "width": 4, "embed_dim": 16, "depth": 1}, (2, 1, 32, 48)),
        (KAFFCN, {"num_classes": 3, "width": 4, "embed_dim": 16, "block": "propagation", "depth": 1}, (2, 1, 32, 48)),
    ],
)
def test_hub_mixin(base: type[nn.Module], arguments: dict[str, Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    shared = type("Shared", (base, hub.PyTorchModelHubMixin), {})
    network, x = shared(**arguments), torch.rand(shape)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network(x, KEYPOINTS)  # moves the running statistics
    network.eval().save_pretrained(tmp_path)
    assert arguments.items() <= json.loads((tmp_path / "config.json").read_text()).items()
    loaded = shared.from_pretrained(str(tmp_path), local_files_only=True)
    torch.testing.assert_close(loaded.state_dict(), network.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(loaded(x, KEYPOINTS), network(x, KEYPOINTS), atol=0, rtol=0)


def test_a_network_with_layers_attached_is_not_saved_without_them_silently(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    shared = type("Shared", (nn.Sequential, hub.PyTorchModelHubMixin), {})
    backbone = shared(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    model = attach(backbone, {"0": 8}, detector=GridDetector(8), embed_dim=16, depth=1)
    for saved in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match=r"without its KAF layers: save the state_dict\(\)"):
            saved.backbone.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match=r"the network's own is model\.backbone\.save_pretrained"):
        model.save_pretrained(tmp_path)
    assert model.remove_layers() is backbone
    backbone.save_pretrained(tmp_path)  # without layers there is nothing to warn about


def test_bundle_is_complete() -> None:
    bundle = pytest.importorskip("monai.bundle")
    properties = pytest.importorskip("monai.bundle.properties")
    parser = bundle.ConfigParser()
    parser.read_meta(CONFIGS / "metadata.json")
    parser.read_config(CONFIGS / "inference.json")
    for item in properties.MetaProperties.values():
        assert parser.get(item["id"].replace("_meta_::", "_meta_#").replace("::", "#")) is not None, item
    bundle.verify_net_in_out(
        "network_def", meta_file=str(CONFIGS / "metadata.json"), config_file=str(CONFIGS / "inference.json"), n=12
    )


def test_bundle_weights_load_and_segment() -> None:
    bundle = pytest.importorskip("monai.bundle")
    parser = bundle.ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    network, about = parser.get_parsed_content("network_def"), json.loads((MODELS / "model.json").read_text())
    unet = torch.load(MODELS / "unet.pt", weights_only=True)
    assert unet.keys() == network.backbone.state_dict().keys()
    network.load_state_dict(torch.load(MODELS / "model.pt", weights_only=True))
    assert sum(parameter.numel() for parameter in network.parameters()) == about["model"]["parameters"]
    assert all(network.layers[name].gain.abs().max() > 0.01 for name in network.layers)  # the layers are in use
    assert not set(about["train"]) & set(about["test"])
    if not SUNNYBROOK.is_dir():
        pytest.skip("../shared/data/sunnybrook is not here")
    train, inference = (
        pytest.importorskip("examples.bundle.train"),
        pytest.importorskip("examples.protocol.experiments.inference"),
    )
    subject, expected = about["model"]["scores"][0]
    stacks = train.load_slices(SUNNYBROOK, network.detector)
    stack = next(stack for stack in stacks if stack.volume.subject == subject)
    (score,) = inference.evaluate(train.WithoutKeypoints(network), [stack], classes=2)[0]
    assert score == pytest.approx(expected, abs=0.01)


def test_bundle_segments_a_file(tmp_path: Path) -> None:
    bundle, nibabel = pytest.importorskip("monai.bundle"), pytest.importorskip("nibabel")
    parser = bundle.ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 148, 200, generator=torch.Generator().manual_seed(0)), 3, 2)
    nibabel.save(nibabel.Nifti1Image(image[0, 0].numpy(), torch.eye(4).numpy()), tmp_path / "image.nii.gz")
    prepare, network, infer, finish = (
        parser.get_parsed_content(name) for name in ("preprocessing", "network_def", "inferer", "postprocessing")
    )
    sample = prepare({"image": tmp_path / "image.nii.gz"})
    assert sample["image"].shape == (1, 96, 96)
    nn.init.ones_(network.layers["model_0"].gain)
    assert network.detector(sample["image"][None]).valid.any()
    with torch.no_grad():
        sample["pred"] = infer(sample["image"][None], network.eval())[0]
        assert not torch.equal(sample["pred"], network.backbone(sample["image"][None])[0])
    labels: Tensor = finish(sample)["pred"]
    assert labels.shape == (1, 96, 96)
    assert set(labels.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("page", "needs"),
    [("sharing", ["huggingface_hub", "monai.bundle"])],
)
def test_pages_run_as_pasted(page: str, needs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in needs:
        pytest.importorskip(name)
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / f"{page}.md").read_text(), flags=re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {"__name__": page})

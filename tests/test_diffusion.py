import pytest
import torch
from common import fill_padding, random_keypoints
from torch import nn

from kaf_layer.diffusion import KeypointDiffusion
from kaf_layer.scattering import scatter_keypoints


@pytest.mark.parametrize("size", [(5, 7), (2, 3, 4)])
def test_it_is_the_papers_network(size):
    kp = random_keypoints(tuple(2 * s for s in size), (9, 0, 4))
    module = KeypointDiffusion(6, 3, hidden_channels=5, spatial_dims=len(size)).double()
    tokens = torch.randn(3, 11, 6, dtype=torch.float64)
    features = torch.randn(3, 2, *size, dtype=torch.float64)
    paper = nn.Sequential(module.conv1, module.norm, nn.ReLU(), module.conv2)
    expected = paper(scatter_keypoints(tokens, kp, size))
    actual = module(fill_padding(tokens, kp), kp, size, features=features)
    torch.testing.assert_close(actual, torch.cat([features, expected], dim=1))


def test_its_state_dict_names_the_layers():
    names = {name.split(".")[0] for name in KeypointDiffusion(8, 4).state_dict()}
    assert names == {"conv1", "norm", "conv2"}

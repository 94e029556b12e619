"""The aesthetic heads against the layouts in which LAION published them."""

import itertools

import pytest
import torch
from torch import nn

from models.curation.aesthetic import AestheticHead


def published_mlp(width: int = 768) -> nn.Module:
    """improved-aesthetic-predictor: dropout between, which is where the layer numbers come from."""
    holder = nn.Module()
    sizes = [width, 1024, 128, 64, 16, 1]
    a, b, c, d, e = (nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
    holder.layers = nn.Sequential(a, nn.Dropout(0.2), b, nn.Dropout(0.2), c, nn.Dropout(0.1), d, e)
    return holder.eval()


@pytest.mark.parametrize("width", [512, 768])
def test_the_linear_head_is_weight_times_unit_features_plus_bias(width):
    torch.manual_seed(0)
    linear = nn.Linear(width, 1)
    features = 7 * torch.randn(5, width)
    head = AestheticHead.from_state_dict(linear.state_dict())
    assert head.width == width
    unit = features / features.norm(dim=-1, keepdim=True)
    by_hand = unit @ linear.weight[0] + linear.bias
    torch.testing.assert_close(head(features), by_hand)


def test_the_mlp_is_its_published_layers_in_order():
    torch.manual_seed(0)
    mlp = published_mlp()
    head = AestheticHead.from_state_dict(mlp.state_dict())
    features = torch.randn(3, 768)
    unit = features / features.norm(dim=-1, keepdim=True)
    assert isinstance(mlp.layers, nn.Sequential)
    torch.testing.assert_close(head(features), mlp.layers(unit)[:, 0])


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(1, 8)},
        {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)},
        {"net.weight": torch.zeros(1, 8), "net.bias": torch.zeros(1)},
        {"layers.0.weight": torch.zeros(4, 8), "layers.0.bias": torch.zeros(4)},
        [torch.zeros(1)],
    ],
)
def test_other_weights_are_refused(state):
    with pytest.raises(ValueError, match=r"layer|key|state dict"):
        AestheticHead.from_state_dict(state)

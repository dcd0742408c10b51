"""The warning about batch normalisation, whose statistics do not take importance weights."""

import pytest
import tiny
import torch
from torch import nn


class Normalised(nn.Module):
    """An image classifier with a normalisation layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(1, tiny.CLASSES)

    def forward(self, pixel_values, labels=None):
        pooled = self.layer(pixel_values).mean((1, 2, 3))[:, None]
        logits = self.linear(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class Frozen(nn.BatchNorm2d):
    """Stays in evaluation mode."""

    def train(self, mode=True):
        return super().train(False)


CHANNELS = tiny.images(1)[0]["pixel_values"].shape[0]


def warnings(tmp_path, caplog, layer, metric="logit_gradient"):
    torch.manual_seed(0)
    tiny.trained(tmp_path, Normalised(layer), tiny.images(), importance={"metric": metric})
    return caplog.text.count("The model has batch normalisation")


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(CHANNELS), nn.SyncBatchNorm(CHANNELS)])
def test_one_warning_about_batch_normalisation(tmp_path, caplog, layer):
    assert warnings(tmp_path, caplog, layer) == 1


@pytest.mark.parametrize("layer", [Frozen(CHANNELS), nn.GroupNorm(1, CHANNELS), nn.InstanceNorm2d(CHANNELS)])
def test_control_other_layers(tmp_path, caplog, layer):
    assert warnings(tmp_path, caplog, layer) == 0


def test_control_uniform_sampling(tmp_path, caplog):
    assert warnings(tmp_path, caplog, nn.BatchNorm2d(CHANNELS), "uniform") == 0

"""Tasks of `networks`: small networks from scratch, whose steps take much longer than the overhead of ours."""

from __future__ import annotations

import functools

from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.fine_tuning_tasks import Material, Recipe, photographs

_SIDE = 32  # pixels, as the photographs have
_GROUPS = 8
"""Of the channels in group normalisation."""


def resnet(layers: int, labels: int) -> nn.Module:
    """A residual network with so many blocks in each of three stages, and batch normalisation.

    Without the pooling at its start, which is for larger images.
    """
    size = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [layers] * 3, "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**size, num_labels=labels))
    model.resnet.embedder.pooler = nn.Identity()
    return model


def resnet_with_groups(layers: int, labels: int) -> nn.Module:
    """The same with group normalisation."""
    model = resnet(layers, labels)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(_GROUPS, child.num_features))
    return model


def vit(layers: int, labels: int) -> nn.Module:
    """A vision transformer on patches of 4 × 4 pixels."""
    size = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192, "num_hidden_layers": layers}
    return ViTForImageClassification(ViTConfig(**size, image_size=_SIDE, patch_size=4, num_labels=labels))


def _photographs(*args: int) -> Material:
    material = photographs(*args, side=_SIDE)
    material.augment = flipped
    return material


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch in which every image is mirrored with probability ½."""
    images = batch["pixel_values"]
    mirrored = images.new_empty(len(images), 1, 1, 1).bernoulli_(0.5).bool()
    return {**batch, "pixel_values": images.flip(-1).where(mirrored, images)}


_recipe = functools.partial(Recipe, read=_photographs, encoder="", epochs=10, learning_rate=2e-3)
NETWORKS = {
    "resnet": _recipe("CIFAR-10; ResNet, batch normalisation", layers=1, network=resnet),
    "resnet_groups": _recipe("CIFAR-10; ResNet, group normalisation", layers=1, network=resnet_with_groups),
    "vit": _recipe("CIFAR-10; ViT", layers=3, network=vit, learning_rate=5e-4),
}
"""Tasks by name."""

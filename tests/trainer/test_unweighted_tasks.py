"""The example scripts of transformers whose models have a loss of their own: they train as with `Trainer`."""

import math

import pytest
import tiny
import torch
import transformers as hf

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
IMAGE, N, LABELS, SPREAD = 32, 12, 3, {"initializer_range": 0.3}


def build(cls, config):
    torch.manual_seed(0)
    return cls(config)


def rows(**columns):
    """Rows whose columns are functions of position and generator."""
    g = torch.Generator().manual_seed(0)
    return [{name: make(i, g) for name, make in columns.items()} for i in range(N)]


def image(i, g):
    """Images of very different contrast, and so of different gradients."""
    return (0.1 + 3.0 * (i % 4 == 0)) * torch.randn(3, IMAGE, IMAGE, generator=g)


def stacked(*names, lists=()):
    """A collator, as in the scripts."""

    def collate(examples):
        batch = {name: torch.stack([row[name] for row in examples]) for name in names}
        return batch | {name: [row[name] for row in examples] for name in lists}

    return collate


# ---- object detection and instance segmentation ----------------------------------------------------------------------


def boxes(i, g):
    number = 1 + i % 2
    sizes = torch.rand(number, 4, generator=g) * 0.3 + 0.2
    return {"class_labels": torch.randint(0, LABELS, (number,), generator=g), "boxes": sizes}


DETECTION = {"collate": stacked("pixel_values", lists=["labels"]), "data": {"pixel_values": image, "labels": boxes}}


def yolos():
    config = hf.YolosConfig(
        **SIZES, **SPREAD, image_size=[IMAGE, IMAGE], patch_size=8, num_detection_tokens=4, num_labels=LABELS
    )
    return build(hf.YolosForObjectDetection, config)


def detr():
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        num_labels=LABELS,
    )
    return build(hf.DetrForObjectDetection, config)


def mask2former():
    backbone = hf.SwinConfig(
        image_size=IMAGE,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = hf.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=4,
        num_labels=LABELS,
        train_num_points=16,
    )
    return build(hf.Mask2FormerForUniversalSegmentation, config)


def masks(i, g):
    return (torch.rand(1 + i % 2, IMAGE, IMAGE, generator=g) < 0.3).float()


SEGMENTATION = {
    "data": {
        "pixel_values": image,
        "pixel_mask": lambda i, g: torch.ones(IMAGE, IMAGE).long(),
        "mask_labels": masks,
        "class_labels": lambda i, g: torch.randint(0, LABELS, (1 + i % 2,), generator=g),
    },
    "collate": stacked("pixel_values", "pixel_mask", lists=["mask_labels", "class_labels"]),
}

# ---- masked images, speech, pairs of images and texts ----------------------------------------------------------------


def mae():
    decoder = {f"decoder_{name}": value for name, value in SIZES.items()}
    config = hf.ViTMAEConfig(**SIZES, **SPREAD, **decoder, image_size=IMAGE, patch_size=8, norm_pix_loss=True)
    return build(hf.ViTMAEForPreTraining, config)


def masked_vit():
    config = hf.ViTConfig(**SIZES, **SPREAD, image_size=IMAGE, patch_size=8, encoder_stride=8)
    return build(hf.ViTForMaskedImageModeling, config)


def wav2vec2():
    config = hf.Wav2Vec2Config(
        **SIZES,
        **SPREAD,
        vocab_size=12,
        conv_dim=[8, 8],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
        ctc_loss_reduction="mean",
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    model = build(hf.Wav2Vec2ForCTC, config)
    model.freeze_feature_encoder()
    return model


def clip():
    text = {**SIZES, "vocab_size": tiny.WORDS, "max_position_embeddings": tiny.LENGTH, "projection_dim": 16}
    vision = {**SIZES, "image_size": IMAGE, "patch_size": 8, "projection_dim": 16}
    return build(hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def pairs(examples):
    batch = stacked("pixel_values", "input_ids", "attention_mask")(examples)
    return {**batch, "return_loss": True}


TASKS = {  # model, columns, collator, training arguments, part of the reason
    "detection, YOLOS": (yolos, DETECTION, {}, "labels must be a tensor, but is a list"),
    "detection, DETR": (detr, DETECTION, {}, "labels must be a tensor, but is a list"),
    "segmentation, Mask2Former": (mask2former, SEGMENTATION, {}, "class_queries_logits"),
    "masked images, MAE": (
        mae,
        {"data": {"pixel_values": image}, "collate": stacked("pixel_values")},
        {"label_names": ["pixel_values"]},
        "Pass per_example_loss_func",
    ),
    "masked images, ViT": (
        masked_vit,
        {
            "data": {
                "pixel_values": image,
                "bool_masked_pos": lambda i, g: torch.rand(16, generator=g) < 0.5,
            },
            "collate": stacked("pixel_values", "bool_masked_pos"),
        },
        {"label_names": ["bool_masked_pos"]},
        "Pass per_example_loss_func",
    ),
    "speech, CTC": (
        wav2vec2,
        {
            "data": {
                "input_values": lambda i, g: (0.1 + 3.0 * (i % 4 == 0)) * torch.randn(400, generator=g),
                "attention_mask": lambda i, g: (torch.arange(400) < 300 + 8 * i).long(),
                "labels": lambda i, g: torch.randint(1, 12, (4,), generator=g),
            },
            "collate": stacked("input_values", "attention_mask", "labels"),
        },
        {},
        "per_example_loss_func",
    ),
    "images and texts, CLIP": (
        clip,
        {
            "data": {
                "pixel_values": image,
                "input_ids": lambda i, g: torch.randint(5, tiny.WORDS, (tiny.LENGTH,), generator=g),
                "attention_mask": lambda i, g: torch.ones(tiny.LENGTH).long(),
            },
            "collate": pairs,
        },
        {},
        "must have",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_training_equals_that_of_trainer(tmp_path, dropping_rows, name):
    make, of_data, settings, reason = TASKS[name]
    data, more = rows(**of_data["data"]), {"data_collator": of_data["collate"]}
    more["eval_dataset"] = data[:4]
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "remove_unused_columns": False, **settings}
    settings |= {"learning_rate": 1e-3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}

    def trained(importance=None, cls=hf.Trainer, **changes):
        run = tiny.trainer(tmp_path, make(), data, cls, importance, more, **{**settings, **changes})
        run.train()
        return run

    theirs, ours = trained(), trained({}, tiny.ImportanceTrainer)
    assert reason in tiny.logged(ours, "train_unweighted")[0]
    assert tiny.difference(ours, theirs) == 0.0
    for key in ("loss", "eval_loss"):
        assert tiny.logged(ours, key) == tiny.logged(theirs, key)
    assert tiny.difference(ours, trained({}, tiny.ImportanceTrainer, seed=1)) > 1e-5, "control: another order"

    dropping = trained({"backward": "selective"}, tiny.ImportanceTrainer)
    assert all(math.isfinite(loss) for loss in tiny.logged(dropping, "loss"))
    assert 0 < tiny.logged(dropping, "train_backward_fraction")[0] < 1
    with pytest.raises(ValueError, match="per_example_loss_func"):
        trained(tiny.REFUSING, tiny.ImportanceTrainer)

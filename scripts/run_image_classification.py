"""Fine-tune an image classifier.

    python scripts/run_image_classification.py
    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --do_train --do_eval --train_dir flowers/train --validation_dir flowers/test

Without arguments, it trains a small vision transformer from scratch on scanned digits; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    Trainer,
    ViTConfig,
    ViTImageProcessor,
)

from hf_importance.command_line.arguments import LabelArguments, ModelArguments, flag, parse
from hf_importance.command_line.data_files import choose_splits, load, require_column
from hf_importance.command_line.embedded_data import digits
from hf_importance.command_line.fine_tuning import make_model, pretrained, run, script, set_seed_and_logging
from hf_importance.command_line.labels import (
    drop_missing_labels,
    head_settings,
    label_column,
    label_names,
    label_reader,
    settings_for_labels,
)

PROBLEM = "single_label_classification"
EMBEDDED = {
    "run_name": "digits",
    "do_train": True,
    "do_eval": True,
    "image_size": 8,
    "patch_size": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "num_train_epochs": 16,
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "warmup_steps": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 20,
}


@dataclass
class ImageArguments(LabelArguments):
    """Flags of the image data, their preprocessing and augmentation."""

    train_dir: str | None = flag(None, "Folder of the training images, with one subfolder per class.")
    validation_dir: str | None = flag(None, "Folder of the evaluation images, with one subfolder per class.")
    train_val_split: float = flag(
        0.15, "Share of the training data held out for evaluation if there is no evaluation data."
    )
    image_column_name: str | None = flag(None, "Column with the images. Defaults to image or img.")
    image_processor_name: str | None = flag(
        None, "Image processor, on the Hub or in a folder. Defaults to the image processor of the model."
    )
    random_crop: bool = flag(False, "Crop training images at random, to at least 60 % of their area.")
    random_flip: bool = flag(False, "Mirror training images horizontally with probability 0.5.")
    image_size: int = flag(64, "Height and width of images in pixels, for a model trained from scratch.")
    patch_size: int = flag(8, "Height and width of patches in pixels, for a model trained from scratch.")

    @property
    def embedded(self) -> bool:
        """Whether no data was given, so that the script uses its embedded data."""
        return super().embedded and self.train_dir is None and self.validation_dir is None


def main(argv: list[str] | None = None) -> Trainer:
    """Run with the flags `argv`, by default `sys.argv[1:]`, and return the trainer."""
    model_arguments, data, training, importance = parse(argv, ImageArguments, EMBEDDED)
    set_seed_and_logging(training)
    splits = digits() if data.embedded else _load(data, model_arguments)
    if training.do_train and training.do_eval and not {"validation", "test"} & set(splits):
        held_out = splits["train"].train_test_split(test_size=data.train_val_split, seed=data.shuffle_seed)
        splits = datasets.DatasetDict(train=held_out["train"], validation=held_out["test"])
    chosen = choose_splits(splits, data, training)
    for rows in chosen.values():
        image = require_column(rows, data.image_column_name, ("image", "img"), "--image_column_name")
    label = label_column(chosen, data)
    chosen = drop_missing_labels(chosen, label)
    head = {}  # without training, the labels are those of the saved model
    if training.do_train:
        head = head_settings(label_names(chosen, label), PROBLEM)
    config = _config(model_arguments, data, head)
    model = make_model(AutoModelForImageClassification, model_arguments, config)
    processor = _processor(model_arguments, data)

    augment = _augmentation(data)
    prepared = {}
    for use, rows in chosen.items():
        columns = [column for column in (image, label) if column in rows.column_names]
        read = label_reader(rows, label, config.label2id) if label in columns else None
        transform = _transform(processor, image, label, read, augment if use == "train" else None)
        prepared[use] = rows.select_columns(columns).cast_column(image, datasets.Image()).with_transform(transform)
    training.remove_unused_columns = False  # the transform reads them
    report_examples = None
    if training.do_train:
        report_examples = chosen["train"].select_columns(image).cast_column(image, datasets.Image())
    return run(
        model_arguments,
        training,
        importance,
        prepared,
        report_examples,
        **settings_for_labels(PROBLEM, data.metric_name),
        model=model,
        processing_class=processor,
    )


def _load(data: ImageArguments, model: ModelArguments) -> datasets.DatasetDict:
    folders = {"train": data.train_dir, "validation": data.validation_dir}
    folders = {split: folder for split, folder in folders.items() if folder is not None}
    for split, folder in folders.items():
        if not Path(folder).is_dir():
            raise ValueError(
                f"--{split}_dir must be a folder with one subfolder per class, but {folder!r} is not a folder."
            )
    if not folders:
        return load(data, model)
    files = {split: str(Path(folder) / "**") for split, folder in folders.items()}
    return datasets.load_dataset("imagefolder", data_files=files, drop_labels=False, cache_dir=model.cache_dir)


def _transform(
    processor: Any,
    image: str,
    label: str | None,
    read_label: Callable[[Any], int] | None,
    augment: Callable[[Image.Image], Image.Image] | None,
) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = [picture.convert("RGB") for picture in rows[image]]
        if augment is not None:
            images = [augment(picture) for picture in images]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        if read_label is None:  # prediction without labels
            return {"pixel_values": list(pixels)}
        return {"pixel_values": list(pixels), "labels": [read_label(value) for value in rows[label]]}

    return transform


def _augmentation(data: ImageArguments) -> Callable[[Image.Image], Image.Image]:
    """Random crops and flips, with the generator of torch, so that `--seed` makes them reproducible."""

    def augment(picture: Image.Image) -> Image.Image:
        if data.random_crop:
            width, height = picture.size
            share, left, top = (0.6 + 0.4 * torch.rand(1).item()) ** 0.5, torch.rand(1).item(), torch.rand(1).item()
            left, top = left * (1 - share) * width, top * (1 - share) * height
            picture = picture.crop((round(left), round(top), round(left + share * width), round(top + share * height)))
        if data.random_flip and torch.rand(1).item() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture

    return augment


def _processor(model: ModelArguments, data: ImageArguments) -> Any:
    name = data.image_processor_name or model.model_name_or_path
    if name is not None:
        return pretrained(AutoImageProcessor, model, name, "--image_processor_name or --model_name_or_path")
    return ViTImageProcessor(size={"height": data.image_size, "width": data.image_size})


def _config(model: ModelArguments, data: ImageArguments, head: dict[str, Any]) -> PreTrainedConfig:
    source = model.config_name or model.model_name_or_path
    if source is not None:
        return pretrained(AutoConfig, model, source, "--config_name or --model_name_or_path", **head)
    return ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=data.image_size,
        patch_size=data.patch_size,
        **head,
    )


if __name__ == "__main__":
    script(main)

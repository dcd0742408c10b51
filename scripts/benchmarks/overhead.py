"""Step time and peak memory relative to `Trainer`, from alternating pairs of short trainings in one process."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_importance import ImportanceTrainer

KEYS = ("model", "workers", "device")
TRAINERS = {"uniform": Trainer, "ours": ImportanceTrainer}
_EXAMPLES = 4096
_WARM_UP = 5  # steps
_CLASSES = 10
_WORDS = 30522


def _bert(width: int, layers: int, length: int) -> nn.Module:
    config = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(2, width // 64)}
    config |= {"vocab_size": _WORDS, "intermediate_size": 4 * width, "max_position_embeddings": length}
    return BertForSequenceClassification(BertConfig(num_labels=_CLASSES, **config))


def _vit(width: int, layers: int, size: int, patch: int) -> nn.Module:
    config = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(2, width // 64)}
    config |= {"image_size": size, "patch_size": patch, "intermediate_size": 4 * width}
    return ViTForImageClassification(ViTConfig(num_labels=_CLASSES, **config))


def _gpt2(width: int, layers: int, length: int) -> nn.Module:
    config = {"n_embd": width, "n_layer": layers, "n_head": max(2, width // 64), "n_positions": length}
    return GPT2LMHeadModel(GPT2Config(vocab_size=_WORDS, bos_token_id=None, eos_token_id=None, **config))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # with tokens per text, or pixels per side
    "BERT tiny": (lambda: _bert(64, 1, 16), 16),
    "BERT small": (lambda: _bert(128, 2, 64), 64),
    "ViT tiny": (lambda: _vit(64, 1, 16, 8), 16),
    "ViT small": (lambda: _vit(128, 3, 32, 4), 32),
    "GPT-2 tiny": (lambda: _gpt2(64, 1, 16), 16),  # dominated by its logits
    "BERT base": (lambda: _bert(768, 12, 128), 128),
    "ViT base": (lambda: _vit(768, 12, 224, 16), 224),
}
SMALL = ("BERT tiny", "BERT small", "ViT tiny", "ViT small", "GPT-2 tiny")
BASE = ("BERT base", "ViT base")


class Examples(torch.utils.data.Dataset):
    """Examples created on the fly, at a small and equal cost for both trainers."""

    def __init__(self, model: str) -> None:
        _, size = MODELS[model]
        image = model.startswith("ViT")
        self.name = "pixel_values" if image else "input_ids"
        self.values = torch.randn(64, 3, size, size) if image else torch.randint(_WORDS, (64, size))
        self.tokens = model.startswith("GPT")

    def __len__(self) -> int:
        return _EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        value = self.values[index % 64]
        return {self.name: value, "labels": value if self.tokens else index % _CLASSES}


class Clock(TrainerCallback):
    """Measures seconds per step after the warm-up."""

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == _WARM_UP:
            self.start = _now()

    def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self.seconds_per_step = (_now() - self.start) / (state.global_step - _WARM_UP)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _train(model: nn.Module, name: str, which: str, workers: int, steps: int, folder: str) -> float:
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=cuda,
        dataloader_pin_memory=cuda,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    clock = Clock()
    TRAINERS[which](model=model, args=arguments, train_dataset=Examples(name), callbacks=[clock]).train()
    return clock.seconds_per_step


def run(name: str, workers: int, device: str, pairs: int = 12, seconds: float = 2.0) -> dict[str, Any]:
    """Measure the step time of both trainers in pairs, in alternating order.

    Args:
        name: name of the model.
        workers: workers of the dataloader.
        device: name of the device, for the file only.
        pairs: number of pairs of trainings.
        seconds: approximate duration of one training.
    """
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with tempfile.TemporaryDirectory() as folder:
        steps = _WARM_UP + max(20, int(seconds / _train(model, name, "uniform", workers, _WARM_UP + 10, folder)))
        _train(model, name, "ours", workers, steps, folder)
        found: dict[str, list[float]] = {which: [] for which in TRAINERS}
        for pair in range(pairs):
            for which in sorted(TRAINERS, reverse=bool(pair % 2)):
                found[which].append(_train(model, name, which, workers, steps, folder))
    in_pairs = list(zip(found["ours"], found["uniform"], strict=True))
    low, median, high = statistics.quantiles([ours / uniform for ours, uniform in in_pairs], n=4)
    return {
        "steps": steps,
        "pairs": pairs,
        "milliseconds": round(1000 * statistics.median(found["uniform"]), 3),
        "extra_milliseconds": round(1000 * statistics.median(ours - uniform for ours, uniform in in_pairs), 3),
        "ratio": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "peak_memory": {which: _peak_memory(name, which) for which in TRAINERS},
    }


def _peak_memory(name: str, which: str) -> int:
    """Peak bytes allocated on the GPU, or resident in a separate process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory_here, name, which).result()


def _peak_memory_here(name: str, which: str) -> int:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        _train(MODELS[name][0](), name, which, 0, 30, folder)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tables(runs: list[dict[str, Any]]) -> str:
    """Table in Markdown."""
    columns = ("model", "device", "workers", "a step of Trainer", "ours, of that (quartiles)", "more", "peak memory")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for found in runs:
        low, high = found["quartiles"]
        memory = found["peak_memory"]
        lines.append(
            f"| {found['model']} | {found['device']} | {found['workers']} | {found['milliseconds']:.1f} ms | "
            f"{found['ratio']:.3f} ({low:.3f}–{high:.3f}) | {found['extra_milliseconds']:.2f} ms | "
            f"{memory['ours'] / memory['uniform']:.3f} |"
        )
    return "\n".join(lines)

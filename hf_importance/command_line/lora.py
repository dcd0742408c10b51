"""LoRA adapters of a pretrained model. Uses peft, which is only imported if they are used."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.utils import find_adapter_config_file

from hf_importance.command_line.arguments import DataArguments, ModelArguments, flag
from hf_importance.command_line.fine_tuning import pretrained


@dataclass
class LoraArguments(DataArguments):
    """Flags of the data, and of LoRA adapters."""

    use_lora: bool = flag(False, "Train and save LoRA adapters (low-rank updates, with peft) instead of all weights.")
    lora_r: int = flag(16, "Rank of the LoRA adapters.")
    lora_alpha: int = flag(32, "Scale of the LoRA adapters: their outputs are multiplied by --lora_alpha / --lora_r.")
    lora_dropout: float = flag(0.05, "Dropout probability of the inputs of the LoRA adapters.")
    lora_target_modules: str | None = flag(
        None,
        "Modules to which LoRA adapters are added: names separated by commas, or all-linear for all linear layers. "
        "Defaults to the choice of peft for the model.",
    )


def refuse_flags(data: LoraArguments, model: ModelArguments, training: TrainingArguments) -> None:
    """Refuse LoRA flags without `--use_lora`, and `--use_lora` without a model or training.

    Raises:
        ValueError: for such flags.
    """
    changed = [f"--{field.name}" for field in _lora_fields() if getattr(data, field.name) != field.default]
    if changed and not data.use_lora:
        raise ValueError(
            f"{' and '.join(changed)} must be passed with --use_lora, because without it all weights are trained: "
            f"add it, or remove {'it' if len(changed) == 1 else 'them'}."
        )
    if data.use_lora and not (training.do_train and model.model_name_or_path):
        raise ValueError(
            "--use_lora needs --do_train and --model_name_or_path, because adapters extend an existing model, which is "
            "not saved with them: pass both, or remove --use_lora."
        )


def _lora_fields() -> list[Field]:
    return [field for field in fields(LoraArguments) if field.name.startswith("lora_")]


def is_adapter(model: ModelArguments) -> bool:
    """Whether `--model_name_or_path` is an adapter saved by peft."""
    hub = {"cache_dir": model.cache_dir, "token": model.token, "revision": model.model_revision}
    try:
        return find_adapter_config_file(model.model_name_or_path, **hub) is not None
    except OSError:  # it does not exist, which is reported when it is loaded
        return False


def load_adapter(auto_class: str, data: LoraArguments, model: ModelArguments, training: TrainingArguments) -> nn.Module:
    """Load the adapter `--model_name_or_path` and the model that it belongs to.

    Args:
        auto_class: name of a class of peft, such as `AutoPeftModelForCausalLM`.
        data: flags of the data and of LoRA adapters.
        model: flags of the model.
        training: whether the adapter is trained further.

    Raises:
        ValueError: with `--use_lora`, without peft, or if the adapter cannot be loaded.
    """
    name = model.model_name_or_path
    if data.use_lora:
        raise ValueError(
            f"--use_lora adds new adapters, but --model_name_or_path {name!r} already is an adapter: remove --use_lora "
            "to train this adapter further."
        )
    settings = {"is_trainable": training.do_train, "dtype": "float32"}
    peft = _peft(f"The adapter {name!r}")
    return pretrained(getattr(peft, auto_class), model, name, "--model_name_or_path", **settings)


def with_adapters(network: nn.Module, task_type: str, data: LoraArguments) -> nn.Module:
    """Add new adapters to a model, and freeze its other weights.

    Raises:
        ValueError: without peft, or if it cannot add adapters with these settings.
    """
    peft, modules = _peft("--use_lora"), data.lora_target_modules
    if modules not in (None, "all-linear"):
        modules = [name.strip() for name in modules.split(",")]
    settings = {"r": data.lora_r, "lora_alpha": data.lora_alpha, "lora_dropout": data.lora_dropout}
    try:
        return peft.get_peft_model(network, peft.LoraConfig(task_type=task_type, target_modules=modules, **settings))
    except ValueError as error:
        flags = " ".join(f"--{field.name} {getattr(data, field.name)}" for field in _lora_fields())
        raise ValueError(f"peft could not add adapters to the model with {flags}: {error}") from error


def _peft(feature: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{feature} needs peft, which could not be imported ({error}): pip install peft") from error
    return peft

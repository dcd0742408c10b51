"""Low-rank adapters (LoRA) of a pretrained model, by peft, which is imported only where they are asked for."""

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
    """Whether all weights are trained, or adapters."""

    use_lora: bool = flag(False, "Train and save low-rank adapters (LoRA, by peft) instead of the whole model.")
    lora_r: int = flag(16, "Their rank.")
    lora_alpha: int = flag(32, "Their outputs are scaled by --lora_alpha / --lora_r.")
    lora_dropout: float = flag(0.05, "Dropout of their inputs.")
    lora_target_modules: str | None = flag(
        None, "Modules that get one: their names, separated by commas, or all-linear (those that peft chooses)."
    )


def refuse_flags(data: LoraArguments, model: ModelArguments, training: TrainingArguments) -> None:
    """Settings of adapters where none are trained, and adapters that would be of no use.

    Raises:
        ValueError: which names them.
    """
    changed = [f"--{field.name}" for field in _settings() if getattr(data, field.name) != field.default]
    if changed and not data.use_lora:
        raise ValueError(f"{' and '.join(changed)}: pass --use_lora too, without which the whole model is trained.")
    if data.use_lora and not (training.do_train and model.model_name_or_path):
        raise ValueError("--use_lora needs --do_train and --model_name_or_path: a new model is not saved with them.")


def _settings() -> list[Field]:
    return [field for field in fields(LoraArguments) if field.name.startswith("lora_")]


def is_adapter(model: ModelArguments) -> bool:
    """Whether the named model is an adapter that was saved by peft."""
    hub = {"cache_dir": model.cache_dir, "token": model.token, "revision": model.model_revision}
    try:
        return find_adapter_config_file(model.model_name_or_path, **hub) is not None
    except OSError:  # there is nothing of that name, as will be said when it is loaded
        return False


def load_adapter(auto_class: str, data: LoraArguments, model: ModelArguments, training: TrainingArguments) -> nn.Module:
    """The named adapter in its model. `auto_class`: of peft."""
    name = model.model_name_or_path
    if data.use_lora:
        raise ValueError(f"--use_lora: {name!r} is an adapter already, and is trained further without this flag.")
    settings = {"is_trainable": training.do_train, "dtype": "float32"}
    peft = _peft(f"The adapter {name!r}")
    return pretrained(getattr(peft, auto_class), model, name, "--model_name_or_path", **settings)


def with_adapters(network: nn.Module, task_type: str, data: LoraArguments) -> nn.Module:
    """A model of which new adapters are trained.

    Raises:
        ValueError: if there is no peft, or the model cannot have them.
    """
    peft, modules = _peft("--use_lora"), data.lora_target_modules
    if modules not in (None, "all-linear"):
        modules = [name.strip() for name in modules.split(",")]
    settings = {"r": data.lora_r, "lora_alpha": data.lora_alpha, "lora_dropout": data.lora_dropout}
    try:
        return peft.get_peft_model(network, peft.LoraConfig(task_type=task_type, target_modules=modules, **settings))
    except ValueError as error:
        named = " ".join(f"--{field.name} {getattr(data, field.name)}" for field in _settings())
        raise ValueError(f"No adapters could be made with --use_lora {named}: {error}") from error


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{what} needs peft, which could not be imported ({error}): pip install peft") from error
    return peft

"""LoRA adapters in the language modeling script."""

import json
import re
import sys

import pytest
import torch
from language_modeling_runs import dishes, main, parameters_of, train
from runs import flags, results, write
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


@pytest.fixture
def lora(tmp_path, tiny_config):
    """Flags that train LoRA adapters of a saved model."""
    pytest.importorskip("peft", reason="pip install peft")
    train(tmp_path, tiny_config, dishes(), output_dir=tmp_path / "base")
    return {"model_name_or_path": tmp_path / "base", "max_seq_length": 48, "learning_rate": 0.01, "use_lora": True}


def test_only_adapters_are_trained_and_saved(tmp_path, lora):
    test = write(tmp_path / "test.json", dishes(3))
    more = {"lora_r": 2, "lora_target_modules": "q_proj,v_proj", "test_file": test, "max_new_tokens": 5}
    trainer = train(tmp_path, lora, dishes(), "--do_eval", "--do_predict", **more)
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {re.search(r"(\w+)\.lora_[AB]", name)[1] for name in trained} == {"q_proj", "v_proj"}
    assert trainer.model.peft_config["default"].r == 2
    base, adapted = parameters_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), parameters_of(trainer.model)
    for name, value in base.items():
        kept = adapted.get(f"base_model.model.{name}")
        kept = adapted[f"base_model.model.{name.replace('.weight', '.base_layer.weight')}"] if kept is None else kept
        assert torch.equal(value, kept)
    assert max(value.abs().max() for name, value in adapted.items() if "lora_B" in name) > 0, "trained: initially 0"
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert (tmp_path / "base" / "model.safetensors").exists(), "control: the base model"


def test_saved_adapters_are_evaluated_and_trained_further(tmp_path, lora):
    train(tmp_path, lora, dishes(), "--do_eval")
    loss = results(tmp_path)["eval_loss"]
    base = {"max_seq_length": 48, "validation_file": tmp_path / "train.json"}
    saved = {**base, "model_name_or_path": tmp_path / "run"}
    main([*flags(tmp_path, **saved, output_dir=tmp_path / "again"), "--do_eval"])
    again = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(loss, rel=1e-5)
    main([*flags(tmp_path, **{**base, **lora, "use_lora": False}, output_dir=tmp_path / "again"), "--do_eval"])
    base_only = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert abs(base_only["eval_loss"] - loss) > 1e-3, "control: the base model"
    more = {**lora, **saved, "output_dir": tmp_path / "further"}
    with pytest.raises(ValueError, match="already is an adapter: remove --use_lora"):
        train(tmp_path, more, dishes())
    trainer = train(tmp_path, {**more, "use_lora": False}, dishes(), "--do_eval")
    assert all("lora" in name for name, value in trainer.model.named_parameters() if value.requires_grad)
    assert json.loads((tmp_path / "further" / "all_results.json").read_text())["eval_loss"] < loss


def test_resumed_training_of_adapters_is_identical(tmp_path, lora):
    more = {"max_steps": 6, "save_steps": 3}
    uninterrupted = parameters_of(train(tmp_path, lora, dishes(), **more).model)
    more |= {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-3", "output_dir": tmp_path / "resumed"}
    resumed = parameters_of(train(tmp_path, lora, dishes(), **more).model)
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())


def test_invalid_lora_flags_are_an_error(tmp_path, lora, monkeypatch):
    with pytest.raises(ValueError, match=r"--lora_r 4 --lora_alpha 32 .* --lora_target_modules none: .*not found"):
        train(tmp_path, lora, dishes(), lora_r=4, lora_target_modules="none")
    with pytest.raises(ValueError, match=r"--lora_r and --lora_dropout must be passed with --use_lora"):
        train(tmp_path, {**lora, "use_lora": False}, dishes(), lora_r=4, lora_dropout=0.2)
    with pytest.raises(ValueError, match=r"--use_lora needs --do_train and --model_name_or_path"):
        train(tmp_path, {"max_seq_length": 48}, dishes(), use_lora=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"--use_lora needs peft, which could not be imported .*: pip install peft"):
        train(tmp_path, lora, dishes())

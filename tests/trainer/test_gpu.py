"""Trainings on a CUDA device: `pytest -m gpu`."""

import warnings

import pytest
import tiny
import torch
from tiny import Recorder
from transformers import Trainer, TrainerCallback

from hf_importance import ImportanceTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
GPU = {"use_cpu": False, "dataloader_pin_memory": True}
FROZEN = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 1e-3), ({"bf16": True}, 0.1), ({"fp16": True}, 0.02)],
    ids=["float32", "bf16", "fp16"],
)
def test_importances_equal_those_on_the_cpu(tmp_path, settings, tolerance):
    model = tiny.opinionated_bert()
    expected = tiny.trained(tmp_path, model, tiny.texts(), **FROZEN).importances
    run = tiny.trained(tmp_path, model, tiny.texts(), **FROZEN, **GPU, **settings)
    assert next(run.model.parameters()).is_cuda
    torch.testing.assert_close(run.importances, expected, rtol=tolerance, atol=tolerance / 3)


def test_uniform_metric_trains_like_trainer(tmp_path):
    settings = {"per_device_train_batch_size": 16, **GPU}
    plain = tiny.trained(tmp_path, tiny.bert(dropout=0.1), tiny.texts(), tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, tiny.bert(dropout=0.1), tiny.texts(), importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) <= 1e-5


class Overflowing(Recorder):
    """Starts with a loss scale that makes gradients overflow."""

    def train(self, *args, **kwargs):
        self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        return super().train(*args, **kwargs)


def test_float16_trains_after_skipped_steps(tmp_path):
    settings = {"fp16": True, "num_train_epochs": 12, "max_grad_norm": 0.0, **GPU}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Overflowing, **settings)
    assert run.accelerator.scaler.get_scale() < 2.0**40, "premise: steps were skipped"
    assert run.importances.isfinite().all()
    assert tiny.logged(run, "loss")[-1] < tiny.logged(run, "loss")[0]


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 3}], ids=str)
@pytest.mark.parametrize(
    "importance", [{}, {"sampling": "replacement"}, tiny.FIXED], ids=["reshuffled", "replacement", "all steps"]
)
def test_resumed_training_is_identical(tmp_path, settings, importance):
    """A transfer of importances is pending when the checkpoint is saved."""
    model = tiny.bert(dropout=0.1)
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, **GPU, **settings}
    whole = tiny.trained(tmp_path, model, tiny.texts(), Recorder, importance, **settings)
    steps = whole.state.global_step
    for step in (1, steps // 2, steps - 1):
        resumed = tiny.trainer(tmp_path / "resumed", model, tiny.texts(), Recorder, importance, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert tiny.difference(resumed, whole) == 0.0
        assert torch.equal(resumed.importances.nan_to_num(-1), whole.importances.nan_to_num(-1))
        assert resumed.draws == whole.draws[len(whole.draws) - len(resumed.draws) :]
        assert resumed.state.global_step == whole.state.global_step
        if tiny.progress_of(whole) is not None:
            assert tiny.progress_of(resumed).value == tiny.progress_of(whole).value


class SynchronisationWarnings(TrainerCallback):
    """Makes CUDA warn of synchronisations from the third step on."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, args, state, control, **_):
        torch.cuda.set_sync_debug_mode("default")


def count_synchronisations(tmp_path, cls, **settings):
    run = tiny.trainer(
        tmp_path, tiny.bert(), tiny.texts(400), cls, more={"callbacks": [SynchronisationWarnings()]}, max_steps=22,
        logging_steps=1000, **GPU, **settings,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_training_adds_no_synchronisations(tmp_path, settings):
    plain = count_synchronisations(tmp_path, Trainer, **settings)
    assert plain > 0, "control: synchronisations of Trainer are counted"
    assert count_synchronisations(tmp_path, ImportanceTrainer, **settings) <= plain


def test_no_copy_of_the_logits_is_kept(tmp_path):
    """Logits of 8 × 256 tokens × 20,000 words take 160 MiB in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20_000, intermediate_size=128, **small))
    words = torch.randint(0, 20_000, (64, 256))
    data = [{"input_ids": row, "labels": row} for row in words]

    def memory(cls):
        torch.cuda.empty_cache()
        run = tiny.trainer(tmp_path, model, data, cls, bf16=True, max_steps=6, logging_steps=100, **GPU)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.train()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before

    memory(Trainer)  # warm-up
    plain, ours = memory(Trainer), memory(ImportanceTrainer)
    print(f"MiB at the peak and after training: {[x >> 20 for x in plain]}, ours {[x >> 20 for x in ours]}")
    assert ours[0] <= 1.05 * plain[0]
    assert ours[1] <= plain[1] + 2**20


def test_compiled_model_has_the_same_importances(tmp_path):
    plain = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), **GPU)
    compiled = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), torch_compile=True, **GPU)
    assert tiny.difference(compiled, plain) < 1e-2
    torch.testing.assert_close(compiled.importances, plain.importances, rtol=0.02, atol=0.01)

"""Importances with half precision, loss scaling and compilation equal those of float32, up to rounding."""

import math

import pytest
import tiny
import torch

from hf_importance import ImportanceTrainer

FROZEN = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    """Importances of `tiny.opinionated_bert()`."""
    folder = tmp_path_factory.mktemp("float32")
    return tiny.trained(folder, tiny.opinionated_bert(), tiny.texts(), **FROZEN).importances


class HalfOnCpu(ImportanceTrainer):
    """`fp16=True` on a CPU: autocast to float16, with a loss scale that makes the first gradients overflow."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
        self.scales = []

    def autocast_smart_context_manager(self, *_, **__):
        return torch.autocast("cpu", dtype=torch.float16)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.scales.append(self.accelerator.scaler.get_scale())  # halved when a step is skipped
        return loss


def test_float16_importances_with_skipped_steps(tmp_path, in_float32):
    half = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), HalfOnCpu, max_grad_norm=0.0, **FROZEN)
    assert half.scales[-1] < half.scales[0], "premise: steps were skipped"
    torch.testing.assert_close(half.importances, in_float32, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("importance", [{}, tiny.FIXED], ids=["auto", "fixed"])
def test_float16_training_with_skipped_steps(tmp_path, importance):
    longer = {"max_grad_norm": 0.0, "num_train_epochs": 12}
    learning = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), HalfOnCpu, importance, **longer)
    settled = learning.scales[20]
    assert learning.scales[0] > settled >= learning.scales[-1] >= settled / 2, "at most one step is skipped later"
    assert learning.importances.isfinite().all()
    assert tiny.logged(learning, "loss")[-1] < tiny.logged(learning, "loss")[0]
    if not importance:
        progress = tiny.progress_of(learning)
        assert math.isfinite(progress.value)
        assert progress.value > learning.state.global_step, "steps count as more than one"
        assert len(learning.scales) == learning.state.global_step < 60


def test_bfloat16_autocast(tmp_path, in_float32):
    half = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), bf16=True, **FROZEN)
    torch.testing.assert_close(half.importances, in_float32, rtol=0.1, atol=0.03)
    assert (half.importances - in_float32).abs().max() > 1e-4, "control: precisions differ"


def test_bfloat16_parameters(tmp_path):
    """Importances are float32, from logits in half precision."""
    model = tiny.opinionated_bert()
    half = tiny.trained(tmp_path, model.to(torch.bfloat16), tiny.texts(), **FROZEN)
    assert half.importances.dtype == torch.float32
    rounded = tiny.trained(tmp_path, model.float(), tiny.texts(), **FROZEN)
    torch.testing.assert_close(half.importances, rounded.importances, rtol=0.15, atol=0.05)


@pytest.mark.parametrize("custom_loss", [False, True], ids=["cross-entropy", "per_example_loss_func"])
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_compiled_model_trains_like_an_uncompiled_one(tmp_path, custom_loss):
    def loss(outputs, labels):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    more = {"per_example_loss_func": loss} if custom_loss else {}
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "num_train_epochs": 2}
    plain = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more=more, num_train_epochs=2)
    compiled = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more=more, **settings)
    assert compiled.state.global_step == plain.state.global_step
    assert tiny.progress_of(compiled).value == pytest.approx(tiny.progress_of(plain).value, rel=1e-4)
    assert tiny.difference(compiled, plain) < 1e-5
    torch.testing.assert_close(compiled.importances, plain.importances, equal_nan=True)
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule", "premise: the model was compiled"


def test_custom_loss_of_a_compiled_model_is_refused(tmp_path):
    settings = {"importance": tiny.REFUSING, "torch_compile": True, "torch_compile_backend": "eager"}
    run = tiny.trainer(tmp_path, tiny.WithoutConfig(scale=1.1), tiny.texts(), **settings)
    with pytest.raises(ValueError, match="its own loss"):
        run.train()


def test_accelerator_config_does_not_affect_training(tmp_path):
    settings = {"split_batches": False, "even_batches": False, "use_seedable_sampler": False, "non_blocking": True}
    plain = tiny.trained(tmp_path, tiny.bert(), tiny.texts())
    other = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), accelerator_config=settings)
    assert tiny.difference(other, plain) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("task", ["single", "regression", "tokens"])
def test_default_types(tmp_path, task, dtype):
    """Models of researchers who set the default type; the state of the sampler stays float32."""
    new = {"single": tiny.opinionated_bert, "regression": lambda: tiny.bert(1), "tokens": tiny.token_bert}[task]
    data = tiny.token_rows(16) if task == "tokens" else tiny.texts(task=task)
    more = {"data_collator": tiny.pad} if task == "tokens" else {}
    settings = {"num_train_epochs": 4, "gradient_accumulation_steps": 2, "more": more}
    torch.set_default_dtype(dtype)
    try:
        run = tiny.trained(tmp_path / "double", new(), data, save_strategy="epoch", **settings)
        again = tiny.trainer(tmp_path / "double", new(), data, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "double" / f"checkpoint-{run.state.global_step}"))
        run.importance_report(tmp_path / "report")
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(run.model.parameters()).dtype == dtype
    assert run.importances.dtype == again.importances.dtype == torch.float32
    assert torch.equal(run.importances, again.importances)
    assert run.importances.isfinite().all()

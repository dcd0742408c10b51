"""Half precision, gradient scaling and compilation give the importances of float32, up to rounding of the logits."""

import math

import pytest
import tiny
import torch

from hf_importance import ImportanceTrainer

FROZEN = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}


def exact(tmp_path, model):
    return tiny.trained(tmp_path, model, tiny.texts(), **FROZEN).importances


class HalfOnCpu(ImportanceTrainer):
    """Like `fp16=True` on a GPU, but on a CPU: autocast to float16, and a scaler that starts much too high."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
        self.scales = []

    def autocast_smart_context_manager(self, *_, **__):
        return torch.autocast("cpu", dtype=torch.float16)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.scales.append(self.accelerator.scaler.get_scale())  # halved where a step was skipped
        return loss


@pytest.mark.parametrize("importance", [{}, tiny.FIXED], ids=["auto", "fixed"])
def test_float16_with_skipped_steps(tmp_path, importance):
    model = tiny.opinionated_bert()
    half = tiny.trained(tmp_path, model, tiny.texts(), HalfOnCpu, max_grad_norm=0.0, **FROZEN)
    assert half.scales[-1] < half.scales[0], "control: gradients overflowed, and steps were skipped"
    torch.testing.assert_close(half.importances, exact(tmp_path, model), rtol=0.02, atol=0.005)
    longer = {"max_grad_norm": 0.0, "num_train_epochs": 8}
    learning = tiny.trained(tmp_path, model, tiny.texts(), HalfOnCpu, importance, **longer)
    settled = learning.scales[20]
    assert learning.scales[0] > settled >= learning.scales[-1] >= settled / 2, "skipped at first, and hardly later"
    assert learning.importances.isfinite().all()
    assert tiny.logged(learning, "loss")[-1] < tiny.logged(learning, "loss")[0]
    if not importance:
        progress = learning._effective.progress
        assert math.isfinite(progress.value)
        assert progress.value > learning.state.global_step, "control: a step counted as more than one"
        assert len(learning.scales) == learning.state.global_step < 40


def test_bfloat16(tmp_path):
    model = tiny.opinionated_bert()
    half = tiny.trained(tmp_path, model, tiny.texts(), bf16=True, **FROZEN)
    torch.testing.assert_close(half.importances, exact(tmp_path, model), rtol=0.1, atol=0.03)
    assert (half.importances - exact(tmp_path, model)).abs().max() > 1e-4, "control: it is another precision"


def test_model_in_bfloat16(tmp_path):
    """Parameters and logits in half precision; importances in float32 from these logits."""
    model = tiny.opinionated_bert()
    half = tiny.trained(tmp_path, model.to(torch.bfloat16), tiny.texts(), **FROZEN)
    assert half.importances.dtype == torch.float32
    torch.testing.assert_close(half.importances, exact(tmp_path, model.float()), rtol=0.15, atol=0.05)


@pytest.mark.parametrize("settings", [{}, {"per_example_loss_func": None}], ids=["usual", "custom loss"])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled(tmp_path, settings):
    """A different graph of the same computation."""

    def loss(outputs, labels):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    more = {name: loss for name in settings}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more=more)
    other = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more=more, **compiled)
    assert other.state.global_step == plain.state.global_step
    assert other._effective.progress.value == pytest.approx(plain._effective.progress.value, rel=1e-4)
    assert tiny.difference(other, plain) < 1e-5
    torch.testing.assert_close(other.importances, plain.importances, equal_nan=True)
    assert type(other.model_wrapped).__name__ == "OptimizedModule", "control: it was compiled"


def test_compiled_models_are_checked_too(tmp_path):
    run = tiny.trainer(
        tmp_path, tiny.WithoutConfig(scale=1.1), tiny.texts(), torch_compile=True, torch_compile_backend="eager"
    )
    with pytest.raises(ValueError, match="its own loss"):
        run.train()


def test_settings_of_accelerate(tmp_path):
    settings = {"split_batches": False, "even_batches": False, "use_seedable_sampler": False, "non_blocking": True}
    plain = tiny.trained(tmp_path, tiny.bert(), tiny.texts())
    other = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), accelerator_config=settings)
    assert tiny.difference(other, plain) == 0.0

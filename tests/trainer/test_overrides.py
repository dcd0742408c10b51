"""Overrides by users: those that call `super()` are honoured; others are refused, at the latest at the first step."""

import types

import pytest
import tiny
import torch
import transformers as hf
from overridden_losses import LossInALaterBase, Weighted
from torch.utils.data import DataLoader, WeightedRandomSampler

from hf_importance import ImportanceTrainer, ImportanceTrainerMixin

# ---- refused -----------------------------------------------------------------------------------------------------


def test_loss_in_a_later_base_is_refused_at_construction(tmp_path):
    message = r"Weighted.compute_loss comes after.*class LossInALaterBase\(Weighted, ImportanceTrainer\).*per_example"
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), LossInALaterBase, tiny.REFUSING)
    tiny.trainer(tmp_path, tiny.bert(), None, LossInALaterBase)  # accepted without training data, for evaluation


class LossWithoutSuper(ImportanceTrainer):
    compute_loss = Weighted.compute_loss


class SuperOnlyInEvaluation(ImportanceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return model(**inputs).loss


class StepWithItsOwnLoss(ImportanceTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class BatchesWithoutSuper(ImportanceTrainer):
    def get_batch_samples(self, iterator, number, device):
        return [next(iterator) for _ in range(number)], None


class BatchesWithoutDraws(ImportanceTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        return super().training_step(model, inputs, *args, **kwargs)


def replace_compute_loss(run):
    run.compute_loss = types.MethodType(Weighted.compute_loss, run)


AT_THE_FIRST_STEP = {
    "compute_loss": (
        LossWithoutSuper,
        "LossWithoutSuper.compute_loss does not reach the method of.*per_example_loss_func=f with f.*Tensor",
    ),
    "compute_loss, in training only": (
        SuperOnlyInEvaluation,
        "SuperOnlyInEvaluation.compute_loss does not reach the method of",
    ),
    "training_step": (StepWithItsOwnLoss, "StepWithItsOwnLoss.training_step does not reach the method of"),
    "get_batch_samples": (BatchesWithoutSuper, "BatchesWithoutSuper.get_batch_samples does not reach the method of"),
    "batches without their draw": (
        BatchesWithoutDraws,
        r"does not carry its draw in batch\['importance_draw'\].*keep this key",
    ),
    "replaced method": (ImportanceTrainer, "No importance was measured.*a replaced method"),
}


WITH_A_LOSS = ("compute_loss", "compute_loss, in training only", "replaced method")
"""Cases in which training could go on with equal weights, see `test_unweighted`."""


@pytest.mark.parametrize(
    ("case", "effective_epochs"),
    [("compute_loss", False), *((case, i % 2 == 0) for i, case in enumerate(AT_THE_FIRST_STEP))],
)
def test_unmeasured_first_step_is_refused_before_the_update(tmp_path, case, effective_epochs):
    cls, message = AT_THE_FIRST_STEP[case]
    settings = {"effective_epochs": effective_epochs}
    if case in WITH_A_LOSS:
        settings |= tiny.REFUSING
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), cls, settings)
    if case == "replaced method":
        replace_compute_loss(run)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert tiny.difference(run, tiny.trainer(tmp_path, tiny.bert(), tiny.texts())) == 0.0
    assert run.state.global_step == 0


class OwnLossAfterTheFirstStep(ImportanceTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 0:
            return super().training_step(model, inputs, *args, **kwargs)
        return StepWithItsOwnLoss.training_step(self, model, inputs)


def test_later_unmeasured_steps_are_refused(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), OwnLossAfterTheFirstStep)
    with pytest.raises(ValueError, match=r"OwnLossAfterTheFirstStep.training_step does not reach the method of"):
        run.train()
    assert run.state.global_step <= 2


class Survivor(ImportanceTrainer):
    """Skips batches that run out of memory, as in many public scripts."""

    skipped = ()

    def training_step(self, model, inputs, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls in self.skipped:
            model.zero_grad()
            return torch.zeros(())
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("skipped", [{1}, {1, 2, 3}, {7, 8}, {1, 9, 10, 11}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_skipped_batches_do_not_end_a_training(tmp_path, skipped, accumulation):
    cls = type("Skipping", (Survivor,), {"skipped": skipped})
    settings = {"importance": tiny.FIXED, "gradient_accumulation_steps": accumulation, "num_train_epochs": 4}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), cls, **settings)
    assert run.state.global_step == 20 // accumulation + (accumulation > 1) * 2
    assert run._run.unweighted == ""
    assert run.importances.isfinite().all()


def test_a_loss_of_its_own_after_skipped_batches_is_still_honoured(tmp_path):
    """The control of the test above: a step with gradients that was not measured is no skipped one."""

    class SkipsThenOwnLoss(StepWithItsOwnLoss):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 0:
                return torch.zeros(())
            return super().training_step(model, inputs)

    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), SkipsThenOwnLoss)
    with pytest.raises(ValueError, match="does not reach the method of ImportanceTrainer"):
        run.train()
    assert run.state.global_step == 1


class SamplerWithoutSuper(ImportanceTrainer):
    def _get_train_sampler(self, *_):
        return WeightedRandomSampler([1.0] * 40, 40)


class SamplerInALaterBase(
    ImportanceTrainerMixin, type("BalancedTrainer", (hf.Trainer,), dict(vars(SamplerWithoutSuper)))
):
    pass


class LoaderWithoutSuper(ImportanceTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=8)


@pytest.mark.parametrize("cls", [SamplerWithoutSuper, SamplerInALaterBase, LoaderWithoutSuper])
def test_samplers_that_would_be_replaced_are_refused(tmp_path, cls):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), cls, tiny.REFUSING)
    with pytest.raises(ValueError, match=r"uses the sampler .*, which importance sampling would replace.*or use Train"):
        run.train()


# ---- honoured --------------------------------------------------------------------------------------------------------


class SuperInAHelper(ImportanceTrainer):
    """Calls `super()` in another method of the class."""

    def compute_loss(self, *args, **kwargs):
        return self._with_penalty(*args, **kwargs)

    def _with_penalty(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss + 0.1, outputs) if return_outputs else loss + 0.1


class StepWithoutSuper(ImportanceTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class StepInALaterBase(
    ImportanceTrainerMixin, type("Stepping", (hf.Trainer,), {"training_step": StepWithoutSuper.training_step})
):
    """Its `training_step` is called by that of the mixin, and calls `compute_loss` of the mixin."""


def without_wraps(method):
    """A decorator that does not use `functools.wraps`."""

    def inner(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return inner


class Decorated(ImportanceTrainer):
    @without_wraps
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


original_compute_loss = ImportanceTrainer.compute_loss


class OriginalInsteadOfSuper(ImportanceTrainer):
    def compute_loss(self, *args, **kwargs):
        return original_compute_loss(self, *args, **kwargs)


class SuperInAnotherBase:
    def _loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class HelperInAnotherBase(SuperInAnotherBase, ImportanceTrainer):
    def compute_loss(self, *args, **kwargs):
        return self._loss(*args, **kwargs)


class SamplerWithSuper(ImportanceTrainer):
    def _get_train_sampler(self, *args):
        return super()._get_train_sampler(*args)


class TwoCallsOfSuper(ImportanceTrainer):
    """Calls `super()` twice, and moves the batches to a device."""

    def get_train_dataloader(self):
        assert len(super().get_train_dataloader()) == 5
        loader = super().get_train_dataloader()
        collate = loader.collate_fn
        loader.collate_fn = lambda rows: {name: value.to("cpu") for name, value in collate(rows).items()}
        return loader


class SkippedBatch(ImportanceTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 3:
            return torch.zeros(())
        return super().training_step(model, inputs, *args, **kwargs)


HONOURED = [
    SuperInAHelper,
    StepWithoutSuper,
    StepInALaterBase,
    Decorated,
    OriginalInsteadOfSuper,
    HelperInAnotherBase,
    SamplerWithSuper,
    TwoCallsOfSuper,
    SkippedBatch,
]


@pytest.mark.parametrize("cls", HONOURED)
def test_overrides_that_reach_the_mixin_are_honoured(tmp_path, cls):
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), cls, tiny.FIXED, num_train_epochs=2)
    assert run.importances.isfinite().all()


class Penalised(hf.Trainer):
    """Adds a penalty to the loss of the next class in the bases."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 10.0 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class PenalisedImportanceTrainer(Penalised, ImportanceTrainer):
    pass


class PenalisedTrainer(Penalised, tiny.Plain):
    pass


def test_penalty_added_to_the_loss_trains_like_with_trainer(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 3}
    model, data = tiny.opinionated_bert(), tiny.texts()
    plain = tiny.trained(tmp_path, model, data, PenalisedTrainer, **settings)
    ours = tiny.trained(tmp_path, model, data, PenalisedImportanceTrainer, {"metric": "uniform"}, **settings)
    assert tiny.difference(plain, ours) < 1e-5
    without = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    assert tiny.difference(without, ours) > 1e-2, "control: without the penalty"


class Distillation(ImportanceTrainer):
    """Computes the loss of a teacher model by the same method, before that of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with torch.no_grad():
            super().compute_loss(self.teacher, inputs, **kwargs)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def test_importances_of_a_teacher_model_are_not_remembered(tmp_path):
    settings = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}
    without_teacher = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), **settings)
    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(), Distillation, **settings)
    run.teacher = tiny.bert()
    run.train()
    assert torch.equal(run.importances, without_teacher.importances)


class CopiedInputs(tiny.Recorder):
    def training_step(self, model, inputs, *args, **kwargs):
        assert set(inputs) == {"input_ids", "attention_mask", "labels", "importance_draw"}
        inputs = {name: value.to("cpu", copy=True) for name, value in inputs.items()}
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_copied_batches_keep_their_draws(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    model = tiny.opinionated_bert()
    plain = tiny.trained(tmp_path, model, tiny.texts(), tiny.Recorder, tiny.FIXED, **settings)
    copied = tiny.trained(tmp_path, model, tiny.texts(), CopiedInputs, tiny.FIXED, **settings)
    assert [draw.index for draw in copied.draws] == [draw.index for draw in plain.draws]
    assert tiny.difference(copied, plain) == 0.0


class TwoPasses(tiny.Recorder):
    """Trains on each batch twice, like adversarial training."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        return (loss + super().training_step(model, inputs, *args, **kwargs)) / 2


def test_batches_that_are_trained_on_twice_keep_their_draw(tmp_path):
    """Twice the same gradients, without dropout; the importances are those of the first pass."""
    settings = {"optim": "sgd", "learning_rate": 0.0, "num_train_epochs": 1}
    once = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), tiny.Recorder, tiny.FIXED, **settings)
    twice = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), TwoPasses, tiny.FIXED, **settings)
    assert twice.draws == [draw for draw in once.draws for _ in range(2)]
    assert torch.equal(twice.importances, once.importances)


def test_a_step_without_super_trains_a_model_with_its_own_loss_like_trainer(tmp_path):
    """Draws are not weighted then, and the model does not get the draw."""
    plain_step = type("PlainStep", (hf.Trainer,), {"training_step": StepWithoutSuper.training_step})
    models = {scale: tiny.WithoutConfig(scale) for scale in (1.0, 1.1)}
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 3}
    ours = tiny.trained(tmp_path, models[1.1], tiny.texts(), StepWithoutSuper, **settings)
    assert ours.state.log_history[-1]["train_unweighted"]
    assert tiny.difference(ours, tiny.trained(tmp_path, models[1.1], tiny.texts(), plain_step, **settings)) == 0.0
    usual = tiny.trained(tmp_path, models[1.0], tiny.texts(), StepWithoutSuper, **settings)
    assert tiny.difference(ours, usual) > 1e-3, "control"

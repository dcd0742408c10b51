"""Code of users is supported or refused with a fix, and never silently ignored."""

import copy
import gc
import re
import types

import pytest
import tiny
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from hf_importance import ImportanceConfig, ImportanceTrainer, ImportanceTrainerMixin
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.support import refuse_version

WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 9.0])


class Weighted(hf.Trainer):
    """The example in the documentation of transformers."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class Penalised(hf.Trainer):
    """A regulariser on the loss of whatever comes after it among the bases."""

    strength = 10.0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.strength * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def weighted_per_example(outputs, labels):
    return cross_entropy(outputs["logits"], labels, weight=WEIGHTS, reduction="none")


# ---- losses ----------------------------------------------------------------------------------------------------------


class Above(ImportanceTrainer):
    compute_loss = Weighted.compute_loss


class Below(ImportanceTrainerMixin, Weighted):
    pass


class OwnStep(ImportanceTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class OwnSampler(ImportanceTrainer):
    def _get_train_sampler(self, *_):
        return WeightedRandomSampler([1.0] * 40, 40)


class SamplerBelow(ImportanceTrainerMixin, type("Balanced", (hf.Trainer,), dict(vars(OwnSampler)))):
    pass


class OwnLoader(ImportanceTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=8)


class NoState(ImportanceTrainer):
    def _save_rng_state(self, output_dir):
        pass


AT_CONSTRUCTION = {
    "a loss above": (Above, "Above.compute_loss does not call super.*per_example_loss_func=f with f.*Tensor"),
    "a loss below": (
        Below,
        r"Weighted.compute_loss comes after.*class Below\(Weighted, ImportanceTrainer\).*per_example",
    ),
    "a step": (OwnStep, r"OwnStep.training_step does not call super\(\).training_step\(\)"),
    "a sampler": (
        OwnSampler,
        r"OwnSampler._get_train_sampler does not call super.*It decides which examples are drawn.*or use Trainer",
    ),
    "a sampler below": (SamplerBelow, "Balanced._get_train_sampler does not call super"),
    "a loader": (OwnLoader, "OwnLoader.get_train_dataloader does not call super.*the collator instead"),
    "a state": (NoState, "NoState._save_rng_state does not call super.*lose the importances"),
}


@pytest.mark.parametrize("case", AT_CONSTRUCTION)
def test_refused_at_construction(tmp_path, case):
    cls, message = AT_CONSTRUCTION[case]
    with pytest.raises(ValueError, match=re.compile(message)):
        tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), cls)
    tiny.trainer(tmp_path, tiny.bert(), None, cls)  # to evaluate only


class ElsewhereCalled(ImportanceTrainer):
    """Calls of `super()` are found anywhere in the class."""

    def compute_loss(self, *args, **kwargs):
        return self._with_penalty(*args, **kwargs)

    def _with_penalty(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss + 0.1, outputs) if return_outputs else loss + 0.1


class OnlyInEvaluation(ImportanceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return model(**inputs).loss


class BesideTheStep(ImportanceTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step > 10**6:
            return super().training_step(model, inputs, *args, **kwargs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class StepBelow(ImportanceTrainerMixin, type("Stepping", (hf.Trainer,), {"training_step": OwnStep.training_step})):
    """Called by ours, and comes to our `compute_loss`."""


def replaced(run):
    run.compute_loss = types.MethodType(Weighted.compute_loss, run)


def quietly(method):
    """A decorator that does not tell what it decorates."""

    def inner(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return inner


class Decorated(ImportanceTrainer):
    @quietly
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


original = ImportanceTrainer.compute_loss


class ByAnotherName(ImportanceTrainer):
    def compute_loss(self, *args, **kwargs):
        return original(self, *args, **kwargs)


class Helper:
    def _loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class WithHelper(Helper, ImportanceTrainer):
    def compute_loss(self, *args, **kwargs):
        return self._loss(*args, **kwargs)


class LogsItsSampler(ImportanceTrainer):
    def _get_train_sampler(self, *args):
        return super()._get_train_sampler(*args)


class AsksTwice(ImportanceTrainer):
    """And moves its batches, as people do for their own devices."""

    def get_train_dataloader(self):
        assert len(super().get_train_dataloader()) == 5
        loader = super().get_train_dataloader()
        collate = loader.collate_fn
        loader.collate_fn = lambda rows: {name: value.to("cpu") for name, value in collate(rows).items()}
        return loader


class OnlyAtFirst(ImportanceTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 0:
            return super().training_step(model, inputs, *args, **kwargs)
        return OwnStep.training_step(self, model, inputs)


class SkipsABatch(ImportanceTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 3:
            return torch.zeros(())
        return super().training_step(model, inputs, *args, **kwargs)


class Distils(ImportanceTrainer):
    """Asks a teacher first, by the same method."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with torch.no_grad():
            super().compute_loss(self.teacher, inputs, **kwargs)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


AT_THE_FIRST_STEP = {
    "a loss": (OnlyInEvaluation, None, "OnlyInEvaluation.compute_loss does not reach the method of"),
    "a step": (BesideTheStep, None, "BesideTheStep.training_step does not reach the method of"),
    "a replaced method": (ImportanceTrainer, replaced, "No importance was measured.*a replaced method"),
}


@pytest.mark.parametrize("case", AT_THE_FIRST_STEP)
@pytest.mark.parametrize("budget", ["auto", 1.0])
def test_stopped_before_anything_is_learnt(tmp_path, case, budget):
    cls, change, message = AT_THE_FIRST_STEP[case]
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), cls, {"budget": budget})
    if change is not None:
        change(run)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert tiny.difference(run, tiny.trainer(tmp_path, tiny.bert(), tiny.texts())) == 0.0
    assert run.state.global_step == 0


HONOURED = [ElsewhereCalled, StepBelow, Decorated, ByAnotherName, WithHelper, LogsItsSampler, AsksTwice, SkipsABatch]


@pytest.mark.parametrize("cls", HONOURED)
def test_what_comes_to_our_methods_is_honoured(tmp_path, cls):
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), cls, tiny.FIXED)
    assert run.importances.isfinite().all()


def test_a_step_of_its_own_from_the_second_on(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), OnlyAtFirst)
    with pytest.raises(ValueError, match=r"OnlyAtFirst.training_step does not reach the method of"):
        run.train()
    assert run.state.global_step <= 2


def test_what_a_teacher_returns_is_not_remembered(tmp_path):
    settings = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}
    usual = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), **settings)
    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(), Distils, **settings)
    run.teacher = tiny.bert()
    run.train()
    assert torch.equal(run.importances, usual.importances)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny.texts())

    def __len__(self):
        return 40


LATER = {
    "a class that is ignored": (Below, {"train_dataset": tiny.texts()}, "Weighted.compute_loss comes after"),
    "a stream": (ImportanceTrainer, {"train_dataset": Stream()}, "Stream is a stream"),
    "a loss": (
        ImportanceTrainer,
        {"train_dataset": tiny.texts(), "compute_loss_func": max},
        "compute_loss_func must be None",
    ),
    "a smoother": (
        ImportanceTrainer,
        {"train_dataset": tiny.texts(), "label_smoother": type("Mine", (), {})()},
        "label_smoother must be the one of label_smoothing_factor, but is Mine",
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_what_is_set_later_is_refused_when_it_trains(tmp_path, case):
    cls, attributes, message = LATER[case]
    run = tiny.trainer(tmp_path, tiny.bert(), None, cls)
    for name, value in attributes.items():
        setattr(run, name, value)
    with pytest.raises(ValueError, match=message):
        run.train()


def test_what_only_training_cannot_do(tmp_path):
    """Without training data it is refused when it trains, so that others may evaluate with it."""
    run = tiny.trainer(
        tmp_path,
        tiny.bert(),
        None,
        more={"compute_loss_func": lambda outputs, labels, **_: 7.0 + outputs.logits.sum() * 0},
    )
    assert run.evaluate(tiny.texts())["eval_loss"] == 7.0
    run.train_dataset = tiny.texts()
    with pytest.raises(ValueError, match="compute_loss_func must be None, because it returns one loss per batch"):
        run.train()


def test_a_copy_of_a_trainer_trains(tmp_path):
    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts())
    again = copy.deepcopy(run)
    again.train()
    assert again.importances.isfinite().all()
    assert run.importances.isnan().all(), "control"


class PenaltyFirst(Penalised, ImportanceTrainer):
    pass


def test_an_override_that_calls_super_is_part_of_the_loss(tmp_path):
    """The step of `Trainer` with the same override where nothing is preferred; the importance is that of the loss."""

    class Plain(Penalised, tiny.Plain):
        pass

    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 3}
    model, data = tiny.opinionated_bert(), tiny.texts()
    plain = tiny.trained(tmp_path, model, data, Plain, **settings)
    ours = tiny.trained(tmp_path, model, data, PenaltyFirst, {"metric": "uniform"}, **settings)
    assert tiny.difference(plain, ours) < 1e-5
    without = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    assert tiny.difference(without, ours) > 1e-2, "control: it changes the step"


def test_the_loss_function_takes_the_place_of_a_loss_below(tmp_path):
    """In training and in evaluations."""
    more = {"per_example_loss_func": weighted_per_example, "eval_dataset": tiny.texts()}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Below, tiny.FIXED, more)
    assert run.importances.isfinite().all()
    logits = torch.tensor(run.predict(tiny.texts()).predictions)
    labels = torch.tensor([row["labels"] for row in tiny.texts()])
    expected = weighted_per_example({"logits": logits}, labels).mean().item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """Logits and no loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(tiny.LENGTH, tiny.CLASSES)

    def forward(self, input_ids, attention_mask=None):
        return self.make(self.layer(input_ids / tiny.WORDS))

    def make(self, logits):
        return {"logits": logits}


class BareTuple(Bare):
    def make(self, logits):
        return (logits,)


def ten_times(outputs, labels):
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return 10 * cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("model", [tiny.bert, Bare, BareTuple])
def test_evaluation_has_the_loss_of_training(tmp_path, model):
    more = {"per_example_loss_func": ten_times, "eval_dataset": tiny.texts()[:24]}
    settings = {"learning_rate": 0.0, "label_names": ["labels"], "per_device_eval_batch_size": 8}
    run = tiny.trainer(tmp_path, model(), tiny.texts(), importance=tiny.EVEN, more=more, **settings)
    before = run.evaluate()["eval_loss"]
    output = run.predict(tiny.texts()[:24])
    labels = torch.tensor([row["labels"] for row in tiny.texts()[:24]])
    expected = 10 * cross_entropy(torch.tensor(output.predictions), labels).item()
    assert before == pytest.approx(expected, rel=1e-5)
    assert before > 5, "control: it is not the cross-entropy itself"
    run.train()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_best_model_is_that_of_the_loss_function(tmp_path):
    """Early stopping and the best model follow what training minimises: here what the model's own loss falls by."""

    def upside_down(outputs, labels):
        return -cross_entropy(outputs["logits"], labels, reduction="none").clamp(max=20)

    more = {"per_example_loss_func": upside_down, "eval_dataset": tiny.texts()}
    run = tiny.trained(
        tmp_path, tiny.opinionated_bert(), tiny.texts(), importance=tiny.FIXED, more=more, save_strategy="epoch",
        eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    losses = tiny.logged(run, "eval_loss")
    assert losses == sorted(losses, reverse=True)
    assert run.state.best_metric == losses[-1] < 0


# ---- loaders ---------------------------------------------------------------------------------------------------------


class Looks(hf.TrainerCallback):
    """Asks for the loader in the middle of training, and looks at some batches; also of the one that it is given."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        assert set(next(iter(train_dataloader))) == {"input_ids", "attention_mask", "labels"}

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        self.trainer.get_train_dataloader()
        next(iter(train_dataloader))

    def on_step_end(self, args, state, control, **_):
        if state.global_step % 4 == 2:
            batches = iter(self.trainer.get_train_dataloader())
            assert len(next(batches)["labels"]) == len(next(batches)["labels"]) == 8


class Noisy:
    """A collator that takes random numbers, as those of masked language models do: also of a generator of its own."""

    def __init__(self):
        self.generator = None

    def __call__(self, rows):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(0)
        batch = hf.default_data_collator(rows)
        shape = batch["attention_mask"].shape
        kept = (torch.rand(shape) < 0.9) & (torch.rand(shape, generator=self.generator) < 0.9)
        batch["attention_mask"] = kept.long()
        return batch


def looking(tmp_path, looks, workers, collate=None, **settings):
    callback = Looks()
    more = {"callbacks": [callback] if looks else [], "data_collator": collate or Noisy()}
    run = tiny.trainer(
        tmp_path, tiny.bert(dropout=0.1), tiny.texts(), more=more, num_train_epochs=6, save_strategy="steps",
        save_steps=13, dataloader_num_workers=workers, **settings,
    )  # fmt: skip
    callback.trainer = run
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_looking_has_no_effect(tmp_path, workers):
    straight = looking(tmp_path / "straight", looks=False, workers=workers)
    straight.train()
    looked = looking(tmp_path / "looked", looks=True, workers=workers)
    looked.train()
    assert tiny.difference(straight, looked) == 0.0
    torch.testing.assert_close(straight.importances, looked.importances, rtol=0, atol=0)
    other = looking(tmp_path / "other", looks=False, workers=workers, seed=1)
    other.train()
    assert tiny.difference(straight, other) > 1e-3, "control"


def test_looking_does_not_disturb_resuming(tmp_path):
    """With a collator that takes no random number: else neither `Trainer` nor we come to the same place."""
    plainly = {"workers": 0, "collate": hf.default_data_collator}
    looked = looking(tmp_path / "looked", looks=True, **plainly)
    looked.train()
    resumed = looking(tmp_path / "resumed", looks=True, **plainly)
    resumed.train(resume_from_checkpoint=str(tmp_path / "looked" / "checkpoint-13"))
    assert tiny.difference(looked, resumed) == 0.0


def test_batches_to_look_at(tmp_path):
    """They go through the model as they are; a pass has every example once, in the order of `Trainer`."""
    plain = list(tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), tiny.Plain).get_train_dataloader())
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    ours = list(run.get_train_dataloader())
    assert [list(batch) for batch in ours] == [list(batch) for batch in plain]
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    assert run.model(**ours[0]).loss.item() == run.compute_loss(run.model, ours[0]).item() > 0


def test_a_loader_to_look_at_after_a_training_that_failed(tmp_path):
    """It is not that of the loop, which never began."""
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), AsksAndFails)
    with pytest.raises(RuntimeError, match="no optimizer"):
        run.train()
    assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


class AsksAndFails(ImportanceTrainer):
    def create_optimizer(self, *_):
        raise RuntimeError("no optimizer")


def test_a_loader_to_look_at_holds_nothing_of_the_examples(tmp_path):
    """It may be kept as long as the training is."""
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    gc.collect()
    before = sum(type(x) is ImportanceMemory for x in gc.get_objects())
    loader = run.get_train_dataloader()
    gc.collect()
    assert sum(type(x) is ImportanceMemory for x in gc.get_objects()) == before
    batches = iter(loader)
    next(batches)
    assert sum(type(x) is ImportanceMemory for x in gc.get_objects()) == before + 1, "control"
    assert len(loader) == 5 == len(list(loader))


class OwnNoise(torch.utils.data.Dataset):
    """Tokens that it masks with a generator of its own."""

    def __init__(self):
        self.rows, self.generator = [{**row, "labels": row["input_ids"] % 4} for row in tiny.texts()], torch.Generator()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        mask = torch.rand(tiny.LENGTH, generator=self.generator) < 0.9
        return {**self.rows[i], "attention_mask": mask.long()}


@pytest.mark.parametrize("saves", ["no", "epoch"])
def test_what_is_read_before_training_has_no_effect(tmp_path, saves):
    """Labels, lengths and the fingerprint: `Trainer` reads none of them, and has the same noise."""
    model = tiny.token_bert()
    settings = {"num_train_epochs": 1, "save_strategy": saves}
    plain = tiny.trained(tmp_path / "plain", model, OwnNoise(), tiny.Plain, **settings)
    ours = tiny.trained(tmp_path / "ours", model, OwnNoise(), importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    other = OwnNoise()
    other[0]
    assert tiny.difference(tiny.trained(tmp_path / "other", model, other, tiny.Plain, **settings), plain) > 1e-4, (
        "control"
    )


class MovesItsInputs(tiny.Recorder):
    def training_step(self, model, inputs, *args, **kwargs):
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}
        inputs = {name: value.to("cpu", copy=True) for name, value in inputs.items()}
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_batches_that_users_make_anew_keep_their_draws(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 4}
    model = tiny.opinionated_bert()
    straight = tiny.trained(tmp_path, model, tiny.texts(), tiny.Recorder, tiny.FIXED, **settings)
    moved = tiny.trained(tmp_path, model, tiny.texts(), MovesItsInputs, tiny.FIXED, **settings)
    assert [draw.index for draw in moved.draws] == [draw.index for draw in straight.draws]
    assert tiny.difference(moved, straight) == 0.0


def below(**methods):
    return type("Loading", (ImportanceTrainerMixin, type("Theirs", (hf.Trainer,), methods)), {})


def loading(**settings):
    return lambda self: DataLoader(self.train_dataset, collate_fn=self.data_collator, **settings)


class Through(DataLoader):
    def __iter__(self):
        return (batch for batch in super().__iter__())


LOADERS = {
    "in order": loading(batch_size=8),
    "weighted": loading(batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 40)),
    "other batches": loading(batch_size=5, shuffle=True),
    "without the last": loading(batch_size=8, shuffle=True, drop_last=True),
    "its own way through": lambda self: Through(self.train_dataset, 8, shuffle=True),
    "some of the data": lambda self: DataLoader(
        self.train_dataset[:32], 8, shuffle=True, collate_fn=self.data_collator
    ),
}


@pytest.mark.parametrize("case", LOADERS)
def test_loaders_that_would_be_replaced_are_refused(tmp_path, case):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), below(get_train_dataloader=LOADERS[case]))
    with pytest.raises(ValueError, match=r"Theirs.get_train_dataloader .*which importance sampling would replace"):
        run.train()


def test_a_loader_that_only_collates_otherwise_is_honoured(tmp_path):
    collated = []

    def collate(rows):
        collated.append(len(rows))
        return hf.default_data_collator(rows)

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, 8, shuffle=True, collate_fn=collate))

    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), below(get_train_dataloader=get_train_dataloader))
    assert sum(collated) >= 8 * run.state.global_step


def test_a_method_that_is_no_more(monkeypatch):
    refuse_version()
    with pytest.raises(
        ImportError, match=rf"overrides Trainer._inner_training_loop, which transformers {hf.__version__}"
    ):
        refuse_version(object)


def test_importances_of_no_data(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), None)
    for ask in ("importances", "kept_indices"):
        with pytest.raises(ValueError, match="importances requires train_dataset"):
            getattr(run, ask)


@pytest.mark.parametrize("seed", [2**63, -1])
def test_seeds_that_no_generator_takes(tmp_path, seed):
    with pytest.raises(ValueError, match=f"data_seed must be in 0 … 2\\^63 − 1, but is {seed}"):
        tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), data_seed=seed)
    with pytest.raises(ValueError, match="seed must be"):
        ImportanceConfig(seed=seed)

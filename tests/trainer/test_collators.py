"""Collators that combine examples, reorder them, leave some out, or make several rows of one."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny import CLASSES, texts
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.data import loader
from hf_importance.data.rows import ROWS_KEY, UNKNOWN, places_in
from hf_importance.run import step
from hf_importance.sampling.draw import Draw

N = 32


class Points(torch.utils.data.Dataset):
    """Points with a class each; the first feature is the position in the data. Items in `bad` cannot be read."""

    def __init__(self, bad=()):
        g = torch.Generator().manual_seed(0)
        self.x, self.bad = torch.randn(N, 6, generator=g), bad
        self.x[:, 0] = torch.arange(N)
        self.y = torch.randint(CLASSES, (N,), generator=g)

    def __len__(self):
        return N

    def __getitem__(self, i):
        return None if i in self.bad else {"x": self.x[i], "labels": self.y[i]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x, labels=None, **_):
        logits = self.layers(x / 10)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


def trainer(folder, collate, data=None, cls=ImportanceTrainer, epochs=3, learning_rate=1e-2, model=None, **kwargs):
    settings = {"importance": kwargs.pop("importance", ImportanceConfig())} if cls is ImportanceTrainer else {}
    extra = {name: kwargs.pop(name) for name in ("callbacks", "eval_dataset") if name in kwargs}
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"per_device_train_batch_size": 8, "save_strategy": "no", **kwargs},
    )
    data = Points() if data is None else data
    return cls(model=model or Net(), args=args, train_dataset=data, data_collator=collate, **extra, **settings)


# ---- collators that combine examples ---------------------------------------------------------------------------------


class Mixup:
    """Blends each example with another one of its batch."""

    def __init__(self, probability=1.0, generator=None):
        self.probability, self.generator = probability, generator

    def __call__(self, examples):
        batch = default_data_collator(examples)
        if torch.rand((), generator=self.generator) < self.probability:
            batch["x"] = 0.7 * batch["x"] + 0.3 * batch["x"][torch.randperm(len(examples), generator=self.generator)]
        return batch


def next_as_negative(examples):
    batch = default_data_collator(examples)
    return {**batch, "negative": batch["x"].roll(1, 0)}


def centred(examples):
    batch = default_data_collator(examples)
    return {**batch, "x": batch["x"] - batch["x"].mean(0)}


def mixed_by_system_random(examples):
    """Random numbers that no seed repeats."""
    batch = default_data_collator(examples)
    order = list(range(len(examples)))
    random.SystemRandom().shuffle(order)
    return {**batch, "x": 0.7 * batch["x"] + 0.3 * batch["x"][order]}


def by_first_feature(examples):
    return default_data_collator(sorted(examples, key=lambda example: -float(example["x"][0])))


def mixed_by_numpy(examples):
    batch = default_data_collator(examples)
    return {**batch, "x": 0.5 * (batch["x"] + batch["x"][np.random.permutation(len(examples))])}


COMBINING = {
    "mixup": Mixup(),
    "mixup now and then": Mixup(0.5),
    "mixup, generator of its own": Mixup(generator=torch.Generator().manual_seed(5)),
    "numpy": mixed_by_numpy,
    "negatives of the batch": next_as_negative,
    "statistics of the batch": centred,
    "random numbers that no seed repeats": mixed_by_system_random,
}


@pytest.mark.parametrize("name", COMBINING)
def test_collators_that_combine_examples_are_drawn_as_by_trainer(tmp_path, name):
    ours = trainer(tmp_path, COMBINING[name])
    output = ours.train()
    assert "combines examples" in output.metrics["train_unweighted"]
    assert "Choose partners in the dataset" in output.metrics["train_unweighted"]
    with pytest.raises(ValueError, match="combines examples"):
        trainer(tmp_path, COMBINING[name], importance=ImportanceConfig(**tiny.REFUSING)).train()


def test_combining_shows_whether_or_not_trainer_removes_columns(tmp_path):
    for removes in (True, False):
        output = trainer(tmp_path, Mixup(), max_steps=1, remove_unused_columns=removes).train()
        assert "the collator Mixup combines examples" in output.metrics["train_unweighted"]


def test_a_training_with_a_combining_collator_is_that_of_trainer(tmp_path):
    def mixed(cls, collate):
        torch.manual_seed(0)
        model = trainer(tmp_path, collate, cls=cls)
        model.train()
        return torch.cat([p.detach().flatten() for p in model.model.parameters()])

    assert torch.equal(mixed(ImportanceTrainer, Mixup()), mixed(Trainer, Mixup()))
    assert not torch.equal(mixed(ImportanceTrainer, default_data_collator), mixed(Trainer, default_data_collator)), (
        "control: draws by importance"
    )


class Masking:
    """Noise of its own in each row, as in masked language modelling."""

    def __init__(self, generator=None):
        self.generator, self.calls = generator, []

    def __call__(self, examples):
        self.calls.append(len(examples))
        batch = default_data_collator(examples)
        noise = torch.randn(batch["x"].shape, generator=self.generator)
        return {**batch, "x": batch["x"] + noise, "companions": torch.tensor(len(examples))}


def noisy_by_system_random(examples):
    batch = default_data_collator(examples)
    noise = [[random.SystemRandom().random() for _ in row] for row in batch["x"]]
    return {**batch, "x": batch["x"] + torch.tensor(noise)}


def with_list(examples):
    return {**default_data_collator(examples), "names": [str(int(example["x"][0])) for example in examples]}


SEPARATE = {
    "lambda": lambda examples: default_data_collator(examples),
    "noise": Masking(),
    "noise, generator of its own": Masking(torch.Generator().manual_seed(5)),
    "noise that no seed repeats": noisy_by_system_random,
    "a list": with_list,
}


@pytest.mark.parametrize("name", SEPARATE)
def test_collators_that_make_each_row_of_one_example_are_weighted(tmp_path, name):
    """The control of the tests above."""
    ours = trainer(tmp_path, SEPARATE[name])
    assert "train_unweighted" not in ours.train().metrics
    assert ours.importances.isfinite().all()


def test_the_check_leaves_the_collator_as_it_was(tmp_path):
    state = torch.Generator().manual_seed(5).get_state()
    collate = Masking(torch.Generator().manual_seed(5))
    ours = trainer(tmp_path, collate, max_steps=1)
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((list(collate.calls), collate.generator.get_state()))

    ours.add_callback(Watch())
    ours.train()
    ((calls, generator),) = seen
    assert calls in ([], [1])  # the first example is collated to see what labels look like
    assert torch.equal(generator, state) or calls == [1]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_combining_shows_in_batches_of_two(tmp_path, batch_size):
    ours = trainer(tmp_path, Mixup(), max_steps=2, per_device_train_batch_size=batch_size)
    assert ("train_unweighted" in ours.train().metrics) == (batch_size > 1)


# ---- collators that change the order ---------------------------------------------------------------------------------


def test_collators_that_reorder_examples_are_not_weighted(tmp_path):
    ours = trainer(tmp_path, by_first_feature)
    assert "changes the order" in ours.train().metrics["train_unweighted"]


def test_collators_that_say_in_what_order_rows_are_weighted(tmp_path):
    def reordered(examples):
        order = sorted(range(len(examples)), key=lambda i: -float(examples[i]["x"][0]))
        return {**default_data_collator([examples[i] for i in order]), ROWS_KEY: order}

    kept = trainer(tmp_path, default_data_collator, seed=3)
    ours = trainer(tmp_path, reordered, seed=3)
    for each in (kept, ours):
        assert "train_unweighted" not in each.train().metrics
    torch.testing.assert_close(ours.importances, kept.importances)
    wrong = trainer(tmp_path, lambda examples: reordered(examples) | {ROWS_KEY: range(len(examples))}, seed=3)
    assert "changes the order" in wrong.train().metrics["train_unweighted"], "control: the wrong order is told"


# ---- collators that leave examples out -------------------------------------------------------------------------------


def without_bad(examples):
    return default_data_collator([example for example in examples if example is not None])


def says_which(examples):
    kept = [i for i, example in enumerate(examples) if example is not None]
    return {**default_data_collator([examples[i] for i in kept]), ROWS_KEY: torch.tensor(kept)}


@pytest.mark.parametrize("collate", [without_bad, says_which])
@pytest.mark.parametrize("bad", [(3, 9, 17), (0,), (31,)])
def test_bad_items_do_not_end_a_training(tmp_path, collate, bad):
    ours = trainer(tmp_path, collate, Points(bad), epochs=6)
    assert "train_unweighted" not in ours.train().metrics
    assert ours.importances.isnan().nonzero().flatten().tolist() == list(bad)
    assert (ours._training.columns()["visits"] > 0).logical_not().nonzero().flatten().tolist() == list(bad)


def test_bad_items_are_found_in_workers(tmp_path):
    ours = trainer(tmp_path, without_bad, Points(bad=[4]), epochs=1, dataloader_num_workers=1)
    ours.train()
    assert ours.importances.isnan().nonzero().flatten().tolist() == [4]


def test_the_rows_that_are_left_get_the_importances_of_their_examples(tmp_path):
    """The first batch of all examples: importances are those of the model at its start."""
    bad = (2, 5, 30)
    ours = trainer(tmp_path, without_bad, Points(bad), max_steps=4, learning_rate=0.0)
    ours.train()
    data = Points()
    p = Net()(data.x)["logits"].softmax(-1)
    expected = (p - nn.functional.one_hot(data.y, CLASSES)).norm(dim=1)
    kept = ours.importances.isfinite()
    assert kept.sum() == N - len(bad)
    torch.testing.assert_close(ours.importances[kept], expected[kept].detach())
    shifted = expected.roll(1)[kept].detach()
    assert not torch.allclose(ours.importances[kept], shifted, atol=1e-3), "control: importances of the neighbours"


def test_rows_of_which_nothing_is_known_have_their_mean_weight(tmp_path, monkeypatch):
    """A rare batch that cannot be attributed does not end a long run, and is told once."""
    batches = itertools.count()

    def rarely(examples):
        if len(examples) == 8 and next(batches) > 30:
            examples = [examples[7], *examples[:4]]  # fewer rows, in another order
        return default_data_collator(examples)

    said = []
    monkeypatch.setattr(step.logger, "warning", said.append)
    ours = trainer(tmp_path, rarely, epochs=10)
    assert "train_unweighted" not in ours.train().metrics
    told = [line for line in said if "it is not known which" in line]
    assert len(told) == 1
    assert (
        f"made 5 rows of 8 examples, and it is not known which. Return from the collator in batch['{ROWS_KEY}']"
        in told[0]
    )


# ---- collators that make several rows --------------------------------------------------------------------------------


def two_views(examples):
    views = [{**example, "x": example["x"] + shift} for example in examples for shift in (0.0, 0.5)]
    return default_data_collator(views)


def two_views_told(examples):
    return two_views(examples) | {ROWS_KEY: [i for i in range(len(examples)) for _ in range(2)]}


def test_several_rows_of_an_example_are_weighted_if_the_collator_says_so(tmp_path):
    ours = trainer(tmp_path, two_views_told, max_steps=4, learning_rate=0.0)
    assert "train_unweighted" not in ours.train().metrics
    data = Points()
    squares = sum(
        (Net()(data.x + shift)["logits"].softmax(-1) - nn.functional.one_hot(data.y, CLASSES)).square().sum(1)
        for shift in (0.0, 0.5)
    )
    torch.testing.assert_close(ours.importances, squares.sqrt().detach())
    untold = trainer(tmp_path, two_views)
    reason = untold.train().metrics["train_unweighted"]
    assert "two_views, or an override, made 16 rows of 8 examples, and it is not known which" in reason
    assert f"Return from the collator in batch['{ROWS_KEY}']" in reason


def test_rows_with_equal_weights_train_as_trainer(tmp_path):
    def parameters(cls, collate, **kwargs):
        torch.manual_seed(0)
        model = trainer(tmp_path, collate, cls=cls, **kwargs)
        model.train()
        return torch.cat([p.detach().flatten() for p in model.model.parameters()])

    even = {"importance": ImportanceConfig(metric="uniform")}
    plain = parameters(Trainer, two_views)
    torch.testing.assert_close(parameters(ImportanceTrainer, two_views_told, **even), plain)
    weighted = parameters(ImportanceTrainer, two_views_told)
    assert not torch.allclose(weighted, plain, atol=1e-4), "control: draws by importance"


@pytest.mark.parametrize("told", [[0, 1], [0, 1, 2, 3, 4, 5, 6, 8], [0.0] * 8])
def test_places_out_of_range_are_refused(tmp_path, told):
    def collate(examples):
        return default_data_collator(examples) | ({ROWS_KEY: told} if len(examples) == 8 else {})

    with pytest.raises(ValueError, match=r"data_collator must return in batch\['importance_rows'\].*0 … 7"):
        trainer(tmp_path, collate).train()


def test_collators_of_transformers_are_not_checked(tmp_path):
    """They are known, so the data is not read for them."""

    def reads(collate):
        seen = []

        class Counting(list):
            def __getitem__(self, i):
                seen.append(i)
                return super().__getitem__(i)

        args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
        data = Counting(texts(40))
        ImportanceTrainer(model=tiny.bert(), args=args, train_dataset=data, data_collator=collate).train()
        return len(seen)

    assert reads(lambda examples: default_data_collator(examples)) == reads(default_data_collator) + 9


# ---- other ways to other rows ----------------------------------------------------------------------------------------


def of_lists(examples):
    kept = [example for example in examples if example is not None]
    x = torch.stack([example["x"] for example in kept]) if kept else torch.empty(0, 6)
    return {"x": x, "labels": torch.tensor([int(example["labels"]) for example in kept])}


def test_a_bad_item_on_its_own_may_make_an_empty_batch(tmp_path):
    ours = trainer(tmp_path, of_lists, Points(bad=[5]), epochs=6)
    assert "train_unweighted" not in ours.train().metrics
    assert ours.importances.isnan().nonzero().flatten().tolist() == [5]


def refilled(examples):
    """Bad items are replaced by good ones, so that there are as many rows as examples."""
    kept = [example for example in examples if example is not None]
    return default_data_collator((kept + kept)[: len(examples)])


def test_a_refilled_batch_has_unknown_rows(tmp_path):
    reason = trainer(tmp_path, refilled, Points(bad=range(0, N, 3))).train().metrics["train_unweighted"]
    assert "made 8 rows of 8 examples, and it is not known which" in reason


class LeavesOut(Points):
    """The dataset itself leaves bad items out of a batch, or returns each item `times` times."""

    times = 1

    def __getitems__(self, indices):
        return [self[i] for i in indices if i not in self.bad for _ in range(self.times)]


def test_items_that_the_dataset_leaves_out(tmp_path):
    ours = trainer(tmp_path, default_data_collator, LeavesOut(bad=[5, 9]), epochs=6)
    assert "train_unweighted" not in ours.train().metrics
    assert ours.importances.isnan().nonzero().flatten().tolist() == [5, 9]
    kept = trainer(tmp_path, without_bad, Points(bad=[5, 9]), epochs=6)
    kept.train()
    torch.testing.assert_close(ours.importances, kept.importances, equal_nan=True)


def test_items_that_the_dataset_returns_several_times(tmp_path):
    data = LeavesOut()
    data.times = 2
    ours = trainer(tmp_path, default_data_collator, data, max_steps=4, learning_rate=0.0)
    assert "train_unweighted" not in ours.train().metrics
    once = trainer(tmp_path, default_data_collator, max_steps=4, learning_rate=0.0)
    once.train()
    torch.testing.assert_close(ours.importances, 2**0.5 * once.importances)


class Strict(Net):
    """Takes nothing but its inputs."""

    def forward(self, x, labels=None):
        return super().forward(x, labels)


@pytest.mark.parametrize("kind", [np.array, tuple, lambda rows: [np.int64(i) for i in rows], torch.tensor])
def test_places_of_any_type_and_what_else_sees_them(tmp_path, kind):
    """They are neither passed to the model in evaluations, nor where draws are not weighted."""

    def told(examples):
        return default_data_collator(examples) | {ROWS_KEY: kind(list(range(len(examples))))}

    settings = {"eval_strategy": "epoch", "eval_dataset": Points()}
    ours = trainer(tmp_path, told, importance=ImportanceConfig(backward="selective"), model=Strict(), **settings)
    assert "train_unweighted" not in ours.train().metrics
    assert len([log for log in ours.state.log_history if "eval_loss" in log]) == 3
    unweighted = trainer(tmp_path, told, train_sampling_strategy="sequential", model=Strict())
    assert "train_unweighted" in unweighted.train().metrics


class DividesLater(ImportanceTrainer):
    """Divides batches in two from some step on, as after running out of memory."""

    since = 4

    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step < self.since:
            return super().training_step(model, inputs, *args, **kwargs)
        losses = []
        for half in (slice(0, 4), slice(4, 8)):
            part = {name: x[half] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
            losses.append(super().training_step(model, part, *args, **kwargs))
        return sum(losses) / 2


def test_batches_that_are_divided_later_do_not_end_a_training(tmp_path):
    ours = trainer(tmp_path, default_data_collator, epochs=4)
    ours.__class__ = DividesLater
    assert "train_unweighted" not in ours.train().metrics
    first = trainer(tmp_path, default_data_collator, epochs=4)
    first.__class__ = type("DividesAtOnce", (DividesLater,), {"since": 0})
    assert "made 4 rows of 8 examples" in first.train().metrics["train_unweighted"]


class Growing(Points):
    number = 16

    def __len__(self):
        return self.number


@pytest.mark.parametrize("number", [24, 8])
def test_data_that_changes_its_length_between_epochs(tmp_path, monkeypatch, number):
    class Changes(TrainerCallback):
        def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
            train_dataloader.dataset.number = number

    said = []
    monkeypatch.setattr(loader.logger, "warning", said.append)
    ours = trainer(tmp_path, default_data_collator, Growing(), callbacks=[Changes()])
    if number < 16:
        with pytest.raises(ValueError, match="had 16 examples when training started, and has 8 now"):
            ours.train()
        return
    ours.train()
    assert "and has 24 now" in said[0]
    assert said[0].endswith("Those that are new are not drawn.")


class TwoTowers(nn.Module):
    """Similarities of all pairs in a batch; the labels are the places of the partners."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x, labels=None):
        y = self.layer(x / 10)
        logits = y @ y.roll(1, 1).T
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def test_similarities_of_all_pairs_in_a_batch_are_not_weighted(tmp_path):
    def places(examples):
        return default_data_collator(examples) | {"labels": torch.arange(len(examples))}

    ours = trainer(tmp_path, places, max_steps=3, model=TwoTowers())
    assert "places 0 … 7 in the batch" in ours.train().metrics["train_unweighted"]


class NeedsWholeBatches:
    """Mixes with numbers that were made for a batch of its own size."""

    def __call__(self, examples):
        batch = default_data_collator(examples)
        return batch | {"x": 0.5 * (batch["x"] + batch["x"][torch.randperm(16)])}


def test_combining_shows_in_whole_batches_and_beside_bad_items(tmp_path):
    whole = trainer(tmp_path, NeedsWholeBatches(), max_steps=2, per_device_train_batch_size=16)
    assert "combines examples" in whole.train().metrics["train_unweighted"]
    mixed = trainer(tmp_path, lambda e: Mixup()([x for x in e if x is not None]), Points(bad=[0]), max_steps=2)
    assert "combines examples" in mixed.train().metrics["train_unweighted"]


def test_lengths_relative_to_the_longest_are_no_combination(tmp_path):
    def relative(examples):
        batch = default_data_collator(examples)
        return batch | {"relative_length": (length := batch["x"][:, 1].abs()) / length.max()}

    assert "train_unweighted" not in trainer(tmp_path, relative, max_steps=2).train().metrics


ORDERS = [lambda examples: examples[::-1], lambda examples: sorted(examples, key=lambda x: int(x["labels"]))]


@pytest.mark.parametrize("order", ORDERS)
def test_any_other_order_is_told_as_such(tmp_path, order):
    reason = trainer(tmp_path, lambda examples: default_data_collator(order(examples))).train().metrics
    assert "changes the order" in reason["train_unweighted"]


# ---- weights of rows -------------------------------------------------------------------------------------------------


def test_weights_of_rows_are_those_of_their_examples():
    draw = Draw(0, [7, 8], [0.5, 0.25], [2.0, 4.0])
    assert draw.row_weights == [2.0, 4.0]
    assert replace(draw, rows=[1, UNKNOWN, 0, 1]).row_weights == [4.0, 3.0, 2.0, 4.0], "the mean where unknown"
    assert draw.of([1]) == Draw(0, [8], [0.25], [4.0])


class RecordsLosses(ImportanceTrainer):
    """Records, for each batch, its loss, the losses of its rows and their weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        losses = nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")
        self.recorded = [*getattr(self, "recorded", []), (loss, losses, torch.tensor(self._run.step.draw.row_weights))]
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("uneven", [True, False])
def test_the_loss_is_over_the_weighted_rows_if_examples_have_different_numbers_of_them(tmp_path, uneven):
    """As with tokens: how many rows a batch has depends on which examples are drawn."""

    def several(examples):
        numbers = [1 + 2 * (uneven and int(example["labels"]) == 0) for example in examples]
        rows = [example for example, number in zip(examples, numbers, strict=True) for _ in range(number)]
        return default_data_collator(rows) | {ROWS_KEY: places_in(numbers)}

    ours = trainer(tmp_path, several, cls=ImportanceTrainer, epochs=8, learning_rate=5e-2)
    ours.__class__ = RecordsLosses
    ours.train()
    differ = 0
    for loss, losses, weight in ours.recorded:
        over_weights, over_rows = (weight * losses).sum() / weight.sum(), (weight * losses).mean()
        torch.testing.assert_close(loss, over_weights if uneven else over_rows)
        differ += not torch.isclose(over_weights, over_rows, rtol=1e-3)
    assert differ > 5, "control: the two are not the same"

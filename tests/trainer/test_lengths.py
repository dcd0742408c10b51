"""Texts of different length in real trainings: costs, grouping, logs, pruning and unsupported settings."""

import datasets
import pytest
import tiny
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy

from hf_importance.lengths import has_token_losses, labels_of, lengths_of
from hf_importance.sampling.rates import relative_costs

GROUPED = {"train_sampling_strategy": "group_by_length"}
WORDS = 40


class Bag(nn.Module):
    """Texts of words, with a class per text or per word."""

    def __init__(self, of_tokens):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.of_tokens = nn.Embedding(WORDS, 8), nn.Linear(8, tiny.CLASSES), of_tokens

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.embed(input_ids)
        if not self.of_tokens:
            mask = attention_mask[..., None].to(hidden.dtype)
            hidden = (hidden * mask).sum(1) / mask.sum(1)
        logits = self.head(hidden)
        loss = None if labels is None else cross_entropy(logits.flatten(0, -2), labels.flatten())
        return {"loss": loss, "logits": logits}


def rows_of(n=120, of_tokens=True, equal=False, prompt=0):
    """Log-normal lengths; the first `prompt` tokens have no loss."""
    g, rows = torch.Generator().manual_seed(1), []
    for _ in range(n):
        length = prompt + (6 if equal else 1 + int(torch.exp(1.5 + 0.8 * torch.randn((), generator=g))))
        words = torch.randint(1, WORDS, (length,), generator=g)
        labels = (words % tiny.CLASSES) if of_tokens else int(words[0]) % tiny.CLASSES
        if of_tokens:
            labels[:prompt] = -100
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return rows


def pad(rows):
    if isinstance(rows[0]["labels"], torch.Tensor):
        return tiny.pad(rows)
    batch = tiny.pad([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows])
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def trainer_of(tmp_path, rows, cls=tiny.Recorder, importance=tiny.FIXED, collate=pad, **settings):
    of_tokens = isinstance(rows[0]["labels"], (list, torch.Tensor))
    more = {"data_collator": collate}
    importance = None if cls is hf.Trainer else importance
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 4, **settings}
    return tiny.trainer(tmp_path, Bag(of_tokens), rows, cls, importance, more, **settings)


def trained(*args, **kwargs):
    run = trainer_of(*args, **kwargs)
    run.train()
    return run


def lengths(rows):
    return torch.tensor([len(row["input_ids"]) for row in rows])


class Padding:
    """Collates, and counts tokens without and with padding."""

    def __init__(self):
        self.real, self.all = 0, 0

    def __call__(self, rows):
        batch = pad(rows)
        if len(rows) > 1:  # a single example is only looked at
            self.real, self.all = self.real + int(batch["attention_mask"].sum()), self.all + batch["input_ids"].numel()
        return batch

    @property
    def share(self):
        return self.real / self.all


# ---- where lengths are costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_tokens", "settings", "config", "costs"),
    [
        (True, {}, {}, True),
        (True, GROUPED, {}, True),
        (False, {}, {}, False),
        (False, GROUPED, {}, True),
        (True, {}, {"metric": "uniform"}, False),
    ],
    ids=["tokens", "tokens, grouped", "texts", "texts, grouped", "uniform"],
)
def test_where_lengths_are_costs(tmp_path, of_tokens, settings, config, costs):
    rows = rows_of(of_tokens=of_tokens)
    run = trained(tmp_path, rows, importance={**tiny.FIXED, **config}, num_train_epochs=1, **settings)
    found = run._sampler.memory.cost
    assert (found is not None) == costs
    if costs:
        assert torch.equal(found, relative_costs(lengths(rows)))
    assert (run._sampler._groups is not None) == bool(settings)


def test_texts_of_equal_length_have_no_costs(tmp_path):
    """Bit for bit as if lengths were unknown."""
    rows = rows_of(equal=True)
    run = trained(tmp_path, rows)
    assert run._sampler.memory.cost is None
    assert run._lengths.length is not None, "premise: they are known"
    hidden = trained(tmp_path, [{**row, "length": 1} for row in rows])
    assert tiny.difference(run, hidden) == 0.0
    assert [draw.weight for draw in run.draws] == [draw.weight for draw in hidden.draws]
    other = trained(tmp_path, [{**row, "length": 1 + i % 3} for i, row in enumerate(rows)])
    assert tiny.difference(run, other) > 1e-4, "control: costs that differ"


def test_rates_of_token_losses_do_not_follow_the_length(tmp_path, monkeypatch, small_gains):
    """Correlations of log importance and log rate with log length."""
    rows = rows_of(300)

    def correlations(run):
        log_length = lengths(rows).double().log()
        values = [run.importances.double(), torch.tensor([of_run[i] for i in range(300)]).double()]
        return [torch.corrcoef(torch.stack([v.log(), log_length]))[0, 1].item() for v in values]

    found = {}
    for name in ("costs", "control"):
        if name == "control":
            monkeypatch.setattr("hf_importance.lengths.Lengths.cost", lambda *_: None)
        run = trained(tmp_path, rows, num_train_epochs=6, learning_rate=1e-3)
        of_run = {i: r for draw in run.draws for i, r in zip(draw.index, draw.rate, strict=True)}
        found[name] = correlations(run)
    assert found["costs"][0] > 0.9, "premise: importance is mostly length"
    assert found["control"][1] > 0.9
    assert found["costs"][1] < 0.5


def test_where_a_tenth_is_not_saved_token_losses_are_those_of_trainer(tmp_path, monkeypatch):
    """From the second half on, once visits provide evidence."""
    weights_of = {}
    for worth in (0.9, 1.0):
        monkeypatch.setattr("hf_importance.sampling.guard._MAX_RELATIVE_SPENDING", worth)
        run = trained(tmp_path, rows_of(300), importance=tiny.FIXED, num_train_epochs=4, learning_rate=1e-3)
        half = len(run.draws) // 2
        weights_of[worth] = {weight for draw in run.draws[half:] for weight in draw.weight}
    assert weights_of[0.9] == {1.0}
    assert len(weights_of[1.0]) > 100, "control"


@pytest.mark.parametrize("settings", [{}, GROUPED])
def test_equal_importances_are_the_steps_of_trainer_where_nothing_is_preferred(tmp_path, settings):
    """Weights of 1 and one visit per pass, regardless of costs and groups."""
    rows = rows_of(of_tokens=False)
    run = trained(tmp_path, rows, importance=tiny.EVEN, num_train_epochs=2, **settings)
    assert {w for draw in run.draws for w in draw.weight} == {1.0}
    assert sorted(i for draw in run.draws[:30] for i in draw.index) == list(range(120))


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_tokens", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_padding_is_no_worse_than_that_of_trainer(tmp_path, of_tokens, accumulation):
    rows, shares = rows_of(240, of_tokens), {}
    more = {"gradient_accumulation_steps": accumulation}
    for name, cls, settings in [
        ("trainer", hf.Trainer, GROUPED),
        ("ours", tiny.Recorder, GROUPED),
        ("trainer, random", hf.Trainer, {}),
        ("ours, random", tiny.Recorder, {}),
    ]:
        collate = Padding()
        trained(tmp_path, rows, cls, collate=collate, num_train_epochs=2, **settings, **more)
        shares[name] = collate.share
    assert shares["ours"] > shares["trainer"] - 0.02
    assert shares["ours, random"] > shares["trainer, random"] - 0.05
    assert shares["trainer"] > shares["trainer, random"] + 0.1, "control"


def test_a_grouped_training_goes_on_exactly(tmp_path):
    rows = rows_of(of_tokens=False)
    settings = {"save_strategy": "steps", "save_steps": 17, "importance": {}, **GROUPED}
    whole = trained(tmp_path / "whole", rows, **settings)
    again = trainer_of(tmp_path / "again", rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-34"))
    assert tiny.difference(whole, again) == 0.0
    assert again.draws == whole.draws[34:] != []


def test_another_order_keeps_the_importances(tmp_path):
    rows = rows_of(of_tokens=False)
    trained(tmp_path, rows, save_strategy="steps", save_steps=17, max_steps=17)
    again = trainer_of(tmp_path, rows, max_steps=18, **GROUPED)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-17"))
    assert again.importances.isfinite().sum() > 60
    assert len(set(again.draws[0].weight)) > 1, "they are known, and differ"


def test_looking_at_batches_shows_the_groups(tmp_path):
    run = trainer_of(tmp_path, rows_of(of_tokens=False), **GROUPED)
    widths = [batch["input_ids"].shape[1] for batch in run.get_train_dataloader()]
    assert widths[0] == max(widths)
    assert len(widths) == 30
    other = [batch["input_ids"].shape[1] for batch in trainer_of(tmp_path, rows_of()).get_train_dataloader()]
    assert sum(other) > 1.2 * sum(widths), "control"


# ---- what is told ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_tokens", "settings"), [(True, {}), (False, GROUPED), (False, {})])
def test_what_is_saved_is_told_in_tokens_too(tmp_path, caplog, of_tokens, settings, small_gains):
    rows = rows_of(of_tokens=of_tokens)
    more = {"importance": {}, "num_train_epochs": 8, "logging_steps": 1, **settings}
    run = trainer_of(tmp_path, rows, **more)
    output, length = run.train(), lengths(rows)
    steps, said = output.global_step, caplog.text
    assert f"ended after {steps} of 240 steps ({steps / 240:.0%})" in said
    assert 100 < steps < 240, "premise: it ends early"
    if not of_tokens and not settings:
        assert "tokens" not in said
        assert "train_share_of_tokens" not in output.metrics
        assert not tiny.logged(run, "importance/cost")
        return
    drawn = [int(length[i]) for draw in run.draws for i in draw.index]
    share = sum(drawn) / (8 * int(length.sum()))
    assert output.metrics["train_share_of_tokens"] == pytest.approx(share, rel=1e-6)
    assert share != pytest.approx(steps / 240, rel=1e-4), "control"
    assert f"with {share:.0%} of the tokens." in said
    cost = sum(drawn) / len(drawn) / length.double().mean().item()
    logged = tiny.logged(run, "importance/cost")
    assert sum(logged) / len(logged) == pytest.approx(cost, rel=1e-4)
    assert "times that of uniform sampling at equal cost" in said


def test_the_variance_ratio_is_at_equal_cost(tmp_path):
    rows = rows_of(200)
    run = trained(tmp_path, rows, logging_steps=1000, save_strategy="no", importance={})
    moments = run._sampler.moments
    cost = moments["cost"] / moments["visits"]
    wanted = moments["ours"] / moments["uniform"] * cost
    run.log({"loss": 1.0})
    assert run.state.log_history[-1]["importance/variance_ratio"] == pytest.approx(wanted)
    assert cost != pytest.approx(1.0, rel=1e-3), "control"


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_pruning_does_not_leave_out_the_shortest_answers(tmp_path, monkeypatch):
    """Answers after prompts, whose length is not that of the text."""
    rows = rows_of(200, prompt=9)
    answers = lengths(rows).double() - 9
    found = {}
    for name in ("tokens", "control"):
        if name == "control":
            monkeypatch.setattr("hf_importance.lengths.labels_of", lambda *_: None)
        config = {**tiny.FIXED, "prune_mass": 0.2}
        run = trained(tmp_path, rows, importance=config, num_train_epochs=3, learning_rate=1e-3)
        kept = torch.zeros(200, dtype=torch.bool).index_fill_(0, run.kept_indices, True)
        assert torch.equal(kept, ~run._sampler.memory.unimportant(0.2))
        assert 10 < (~kept).sum() < 150, "premise"
        found[name] = (answers[~kept].median() / answers[kept].median()).item()
    assert found["control"] < 0.5
    assert found["tokens"] > 0.75


# ---- how lengths are known -------------------------------------------------------------------------------------------


def test_lengths_of_anything():
    rows = [{"input_ids": [1] * n, "labels": [-100] * (n // 2) + [1] * (n - n // 2)} for n in (3, 5, 1, 8)]
    table = datasets.Dataset.from_list(rows)
    for data in (
        rows,
        table,
        table.with_format("torch"),
        [{k: torch.tensor(v) for k, v in row.items()} for row in rows],
    ):
        assert lengths_of(data, "length").tolist() == [3, 5, 1, 8]
        assert labels_of(data, lengths_of(data, "length")).tolist() == [2, 3, 1, 4]
    selected = table.select([3, 1])
    assert lengths_of(selected, "length").tolist() == [8, 5]
    assert labels_of(selected, torch.ones(2)).tolist() == [4, 3]
    counted = table.add_column("length", [10, 20, 30, 0])
    assert lengths_of(counted, "length").tolist() == [10, 20, 30, 1]
    assert lengths_of(counted.to_list(), "length").tolist() == [10, 20, 30, 1]
    assert lengths_of(counted, "another").tolist() == [3, 5, 1, 8], "control"
    named = table.add_column("length", ["long", "12", "short", "long"])
    for data in (named, named.to_list()):
        assert lengths_of(data, "length").tolist() == [3, 5, 1, 8], "of another meaning"


def test_lengths_of_what_a_transform_makes():
    table = datasets.Dataset.from_list([{"text": "a b"}, {"text": "a"}])
    table.set_transform(lambda batch: {"input_ids": [text.split() for text in batch["text"]]})
    assert lengths_of(table, "length").tolist() == [2, 1]


def test_labels_of_texts_without_one_per_token():
    rows = [{"input_ids": [1, 2], "labels": 3}, {"input_ids": [1], "labels": 2}]
    assert labels_of(rows, torch.tensor([2, 1])).tolist() == [2, 1]


@pytest.mark.parametrize("name", ["labels", "labels of a collator", "classes", "several", "images", "decoder"])
def test_token_losses_are_told_by_what_an_example_collates_to(name):
    ids = {"input_ids": torch.ones(5, dtype=torch.int64)}
    rows = {
        "labels": [{**ids, "labels": torch.ones(5, dtype=torch.int64)}],
        "labels of a collator": [ids],
        "classes": [{**ids, "labels": 3}],
        "several": [{**ids, "labels": torch.ones(5)}],
        "images": [{"pixel_values": torch.ones(2), "labels": torch.ones(5, dtype=torch.int64)}],
        "decoder": [{**ids, "labels": torch.ones(3, dtype=torch.int64)}],
    }[name]

    def collate(examples):
        batch = hf.default_data_collator(examples)
        return {**batch, "labels": batch["input_ids"]} if name == "labels of a collator" else batch

    wanted = {"labels": (True, True), "labels of a collator": (True, True), "decoder": (False, True)}
    found = [has_token_losses(rows, collate, ["labels"], writes) for writes in (False, True)]
    assert tuple(found) == wanted.get(name, (False, False))


def test_counting_takes_no_random_numbers(tmp_path):
    """Random numbers of augmentation and of a masking collator."""

    class Random(torch.utils.data.Dataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            torch.rand(1)
            return self.rows[i]

    rows = Random(rows_of())
    before = torch.get_rng_state()
    assert lengths_of(rows, "length").tolist() == lengths(rows.rows).tolist()
    labels_of(rows, lengths(rows.rows))
    has_token_losses(rows, lambda examples: (torch.rand(1), pad(examples))[1], ["labels"])
    assert torch.equal(torch.get_rng_state(), before)
    assert rows[0] is not None
    assert not torch.equal(torch.get_rng_state(), before), "control"


@pytest.mark.parametrize("strategy", ["sequential", "batch_rebalance"])
def test_other_orders_are_refused_with_the_reason(tmp_path, strategy):
    reason = {
        "sequential": "in an order of its own",
        "batch_rebalance": "batches of different sizes.*group_by_length",
    }
    with pytest.raises(ValueError, match=f"train_sampling_strategy must be .*{strategy}.*{reason[strategy]}.*or use"):
        trainer_of(tmp_path, rows_of(), train_sampling_strategy=strategy)
    trainer_of(tmp_path, rows_of(), **GROUPED)  # control


def test_groups_without_lengths_are_refused(tmp_path):
    rows = [{"pixel_values": torch.ones(1, 8, 8), "labels": i % 4} for i in range(8)]
    message = (
        r"requires the length of each example, in a column 'length'.*'input_ids', but.*'pixel_values'.*dataset.map"
    )
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, tiny.vit(), rows, **GROUPED)
    tiny.trainer(tmp_path, tiny.vit(), [{**row, "length": 3} for row in rows], **GROUPED)  # control
    named = [{**row, "size": i} for i, row in enumerate(rows)]
    run = tiny.trainer(tmp_path, tiny.vit(), named, **GROUPED, length_column_name="size", max_steps=1)
    run.train()
    assert run._lengths.length.tolist() == [1, 1, 2, 3, 4, 5, 6, 7]

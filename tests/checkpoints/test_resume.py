"""Resumed training equals uninterrupted training; and checkpoints that do not match."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy
import pytest
import tiny
import torch
from tiny import Recorder

from hf_importance import ImportanceConfig
from hf_importance.checkpoint import load_states, newest_complete, save_state
from hf_importance.fingerprint import differences, fingerprint
from hf_importance.sampling.rates import rates

MODEL = {"dropout": 0.1}
SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


def record_of(run):
    """All recorded columns, with NaN as −1."""
    record = run._sampler.record
    return {name: column.nan_to_num(-1) for name, column in record.columns().items()}, record.distributions


def same_record(a, b):
    (columns, moments), (others, other_moments) = record_of(a), record_of(b)
    assert all(torch.equal(column, others[name]) for name, column in columns.items())
    assert len(moments) == len(other_moments)
    for mine, other in zip(moments, other_moments, strict=True):
        assert mine.visits == other.visits
        assert torch.equal(mine.visits_since, other.visits_since)
    return True


def same_progress(a, b):
    """Equal effective steps and gain; or both do not count them."""
    if a._effective is None:
        return b._effective is None
    mine, other = (run._effective.progress.state_dict() for run in (a, b))
    return torch.equal(mine.pop("sums"), other.pop("sums")) and mine == other


def same_training(again, whole):
    """Compare a resumed run with an uninterrupted one."""
    assert again.state.global_step == whole.state.global_step
    assert again.state.epoch == whole.state.epoch
    assert tiny.difference(again, whole) == 0.0
    assert torch.equal(again.importances.nan_to_num(-1), whole.importances.nan_to_num(-1))
    assert again.draws == whole.draws[len(whole.draws) - len(again.draws) :]
    assert same_record(again, whole)
    assert same_progress(again, whole)
    for name in ("loss", "learning_rate", "importance/seen", "importance/effective_epoch"):
        assert tiny.logged(again, name) == tiny.logged(whole, name)
    return True


def straight(tmp_path, importance=None, data=None, **settings):
    """40 examples in batches of 8, 3 epochs."""
    data = data or tiny.texts()
    return tiny.trained(tmp_path, tiny.bert(**MODEL), data, Recorder, importance, **{**SAVING, **settings})


def resumed(tmp_path, step, importance=None, data=None, **settings):
    """Resume into new objects from the checkpoint of a step."""
    checkpoint = tmp_path / f"checkpoint-{step}"
    elsewhere = tmp_path / "resumed"
    shutil.rmtree(elsewhere, ignore_errors=True)
    other = tiny.bert(**MODEL, initializer_range=0.5)  # whose parameters must not matter
    settings = {**SAVING, "save_strategy": "no", **settings}
    run = tiny.trainer(elsewhere, other, data or tiny.texts(), Recorder, importance, **settings)
    torch.manual_seed(12345)
    run.train(resume_from_checkpoint=str(checkpoint))
    return run


SETTINGS = {
    "plain": {},
    "fixed budget": {"importance": tiny.FIXED},
    "replacement": {"importance": {"sampling": "replacement"}},
    "replacement, fixed budget": {"importance": {"sampling": "replacement", **tiny.FIXED}},
    "pruning, budget": {"importance": {"prune_mass": 0.1, "budget": 0.7, "importance_increment": 0.01}},
    "pruning": {"importance": {"prune_mass": 0.1}},
    "pruning, replacement": {"importance": {"prune_mass": 0.1, "sampling": "replacement"}},
    "exponent": {"importance": {"weight_exponent": 0.5, "memory_momentum": 0.0}},
    "uniform": {"importance": {"metric": "uniform"}},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, fixed budget": {"gradient_accumulation_steps": 3, "importance": tiny.FIXED},
    "workers": {"dataloader_num_workers": 2},
    "workers, replacement": {"dataloader_num_workers": 2, "importance": {"sampling": "replacement"}},
    "persistent, accumulation": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "gradient_accumulation_steps": 3,
        "importance": {"sampling": "replacement"},
    },
    "batch that does not divide": {"per_device_train_batch_size": 7},
    "drop_last": {"per_device_train_batch_size": 7, "dataloader_drop_last": True},
    "bf16": {"bf16": True},
    "ignore_data_skip": {"ignore_data_skip": True, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_is_straight(tmp_path, case):
    settings = SETTINGS[case]
    whole = straight(tmp_path, **settings)
    steps = whole.state.global_step
    assert steps == whole.state.max_steps
    for step in (1, steps // 3, steps // 2, steps - 1):
        again = resumed(tmp_path, step, **settings)
        assert 0 < len(again.draws) < len(whole.draws)
        assert same_training(again, whole)


# ---- a training that ends early --------------------------------------------------------------------------------------

EARLY = {
    "plain": {},
    "replacement": {"importance": {"sampling": "replacement"}},
    "accumulation": {"gradient_accumulation_steps": 2, "data": tiny.texts()},
    "workers": {"dataloader_num_workers": 2, "importance": {"prune_mass": 0.02}},
    "max_steps": {"max_steps": 48, "lr_scheduler_type": "cosine"},
}
QUICK = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "num_train_epochs": 8, "data": tiny.texts(24)}


@pytest.mark.parametrize("case", EARLY)
def test_a_training_that_ends_early_resumes_to_the_same_end(tmp_path, case):
    """From steps in the middle, the last but one, and the end, where nothing is left to train."""
    settings = {**QUICK, **EARLY[case]}
    whole = straight(tmp_path, **settings)
    steps, progress = whole.state.global_step, whole._effective.progress
    assert steps < progress.steps, "it ended early"
    assert progress.finished
    assert not (tmp_path / f"checkpoint-{steps + 1}").exists()
    for step in (1, steps // 2, steps - 2, steps - 1, steps):
        again = resumed(tmp_path, step, **settings)
        assert len(again.draws) >= steps - step
        assert same_training(again, whole)
    assert again.draws == [], "the last was of the end"


def test_control_without_what_was_learnt_it_does_not_end(tmp_path):
    whole = straight(tmp_path, **QUICK)
    steps = whole.state.global_step
    for step in (steps - 1, steps):
        (state,) = load_states(tmp_path / f"checkpoint-{step}")
        assert (state["effective"]["progress"]["value"] >= whole._effective.progress.steps) == (step == steps)
        save_state(tmp_path / f"checkpoint-{step}", 0, 1, {**state, "effective": None})
        assert resumed(tmp_path, step, **QUICK).state.global_step > steps


@pytest.mark.parametrize("part", ["progress", "gradients", "measured_until", "pending"])
def test_control_all_parts_of_what_was_learnt_are_needed(tmp_path, part):
    """Resetting any of them changes the count."""
    settings = {**QUICK, "num_train_epochs": 3, "logging_steps": 1000}
    whole = straight(tmp_path, **settings)
    (fresh,), (state,) = (load_states(tmp_path / f"checkpoint-{step}") for step in (1, 12))
    state["effective"][part] = fresh["effective"][part]
    save_state(tmp_path / "checkpoint-12", 0, 1, state)
    again = resumed(tmp_path, 12, **settings)
    assert again._effective.progress.value != whole._effective.progress.value


# ---- what was measured and is not yet remembered ---------------------------------------------------------------------

LARGE = {"save_steps": 28, "logging_steps": 1000, "num_train_epochs": 1.3}


def large():
    """640 rows; their first token is the position modulo 60."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, tiny.WORDS, (640, tiny.LENGTH), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row.sum()) % tiny.CLASSES}
        for row in rows
    ]


def both(tmp_path, step, change=lambda state: state, **settings):
    """An uninterrupted run, and one from its checkpoint, with possible changes."""
    settings = {**SAVING, **LARGE, **settings}
    whole = tiny.trained(tmp_path, tiny.bert(**MODEL), large(), Recorder, **settings)
    (state,) = load_states(tmp_path / f"checkpoint-{step}")
    save_state(tmp_path / f"checkpoint-{step}", 0, 1, change(state))
    return whole, resumed(tmp_path, step, data=large(), **settings), state


@pytest.mark.parametrize("budget", ["auto", 1.0])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("sampling", "waiting"), [("reshuffled", 4), ("replacement", 1)])
def test_what_was_measured_and_not_remembered_is_saved(tmp_path, sampling, waiting, workers, budget):
    """Only the sampler reads the memory: once per segment, or at each draw."""
    settings = {"importance": {"sampling": sampling, "budget": budget}, "dataloader_num_workers": workers}
    whole, again, state = both(tmp_path, 84, **settings)  # 4 steps after the first pass
    measured = state["sampler"]["measured"]
    assert len(measured) >= waiting
    assert [draw[0] for draw, _ in measured] == list(range(84))[-len(measured) :]
    (draw, rows), known = measured[-1], state["sampler"]["memory"]["importance"]
    assert not torch.isin(rows[0], known[draw[1]]).any(), "it is not in the memory yet"
    assert len(again.draws) == len(whole.draws) - 84 == 20
    assert same_training(again, whole)


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_control_without_what_was_measured_it_differs(tmp_path, sampling):
    def forgetting(state):
        return {**state, "sampler": {**state["sampler"], "measured": []}}

    whole, again, _ = both(tmp_path, 84, forgetting, importance={"sampling": sampling, **tiny.FIXED})
    assert again.draws != whole.draws[84:]
    assert tiny.difference(again, whole) > 1e-6


@pytest.mark.parametrize("step", [4, 14])
def test_logs_are_those_of_a_training_that_was_not_interrupted(tmp_path, step):
    """The next log covers the time since the last log, also with a checkpoint in between."""
    settings = {"logging_steps": 10, "save_steps": 2, "num_train_epochs": 0.7}
    whole, again, _ = both(tmp_path, step, **settings)
    for name in ("variance_ratio", "mean", "effective_sample_size", "seen"):
        assert tiny.logged(again, f"importance/{name}") == tiny.logged(whole, f"importance/{name}")
    assert len(tiny.logged(again, "importance/mean")) == 5


# ---- other ways to go on ---------------------------------------------------------------------------------------------


def test_control_without_our_state_it_differs(tmp_path):
    whole = straight(tmp_path)
    for path in (tmp_path / "checkpoint-7").glob("importance_*"):
        path.unlink()
    again = resumed(tmp_path, 7)
    assert tiny.difference(again, whole) > 1e-6


def test_resumed_twice(tmp_path):
    whole = straight(tmp_path)
    resumed(tmp_path, 4, save_strategy="steps")
    shutil.copytree(tmp_path / "resumed" / "checkpoint-9", tmp_path / "checkpoint-9", dirs_exist_ok=True)
    assert tiny.difference(resumed(tmp_path, 9), whole) == 0.0


def test_finished_training_resumes_to_itself(tmp_path):
    whole = straight(tmp_path, tiny.FIXED)
    again = resumed(tmp_path, 15, tiny.FIXED)
    assert again.draws == []
    assert same_training(again, whole)


def test_state_is_plain_and_small(tmp_path):
    straight(tmp_path, dataloader_num_workers=2, max_steps=7)
    (state,) = load_states(tmp_path / "checkpoint-4")  # torch.load(weights_only=True)
    sampler = state["sampler"]
    assert sampler["shard"] is None
    assert len(sampler["outstanding"]) == 1, "all 5 batches of the epoch are drawn, and 4 used"
    assert sampler["memory"]["importance"].dtype == torch.float32
    visits = sampler["visits"]
    assert visits["index"].untyped_storage().nbytes() == 4 * len(visits["index"]), "not what it is a view of"
    assert {"format", "rank", "ranks", "settings", "data", "sampler", "effective", "objective"} <= set(state)
    assert state["format"] == 7
    assert state["effective"]["progress"]["value"] >= 4
    path = next((tmp_path / "checkpoint-4").glob("importance_*.pt"))
    assert path.stat().st_size < 40_000


# ---- checkpoints that are not as expected ----------------------------------------------------------------------------


@pytest.fixture
def warnings_of(monkeypatch):
    found = []
    monkeypatch.setattr("hf_importance.hooks.checkpoints.logger.warning", lambda text: found.append(text))
    return found


def test_checkpoint_of_trainer(tmp_path, warnings_of):
    tiny.trained(tmp_path, tiny.bert(**MODEL), tiny.texts(), tiny.Plain, **SAVING)
    again = resumed(tmp_path, 7)
    assert again.state.global_step == 15
    assert "contains no importances: they start unknown" in warnings_of[0]
    assert len(again.draws) == 8
    assert set(again.draws[0].weight) == {1.0}


def test_checkpoint_of_a_model_only(tmp_path, warnings_of):
    """As with `Trainer`, training starts from its parameters; optimizer and importances are new."""
    straight(tmp_path, save_only_model=True)
    assert not list(tmp_path.glob("checkpoint-7/importance_*.pt"))
    again = resumed(tmp_path, 7)
    assert again.state.global_step == 15
    assert "contains no importances" in warnings_of[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"not a file of torch"])
def test_damaged_state(tmp_path, content):
    straight(tmp_path)
    (path,) = (tmp_path / "checkpoint-7").glob("importance_*.pt")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"importance_00000_of_00001.pt cannot be read .* delete"):
        resumed(tmp_path, 7)
    path.unlink()  # what the message says
    assert resumed(tmp_path, 7).state.global_step == 15


@pytest.mark.parametrize("content", [{"format": 99, "sampler": {}}, {"weights": torch.ones(3)}, [1, 2]])
def test_foreign_state(tmp_path, content):
    straight(tmp_path, max_steps=3)
    (path,) = (tmp_path / "checkpoint-2").glob("importance_*.pt")
    torch.save(content, path)
    with pytest.raises(ValueError, match="cannot be read"):
        resumed(tmp_path, 2, max_steps=3)


def test_state_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemError('it ran')",))

    straight(tmp_path, max_steps=3)
    (path,) = (tmp_path / "checkpoint-2").glob("importance_*.pt")
    torch.save({"format": 1, "sampler": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        resumed(tmp_path, 2, max_steps=3)


def test_missing_rank(tmp_path):
    save_state(tmp_path, 1, 2, {"sampler": {}})
    with pytest.raises(ValueError, match=r"importance_00000_of_00002.pt cannot be read"):
        load_states(tmp_path)


def damage(change):
    """A change of the state in the file of a checkpoint."""

    def apply(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return apply


def short(*path):
    """Half of a tensor, by its place in the state."""

    def change(state):
        *parents, name = path
        for parent in parents:
            state = state[parent]
        state[name] = state[name][: len(state[name]) // 2]

    return damage(change)


def put(value, *path):
    def change(state):
        *parents, name = path
        for parent in parents:
            state = state[parent]
        state[name] = value

    return damage(change)


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def rename(name):
    return lambda path: path.rename(path.with_name(name))


def beside(name):
    return lambda path: path.with_name(name).write_bytes(path.read_bytes())


ALL = torch.arange(40)
DAMAGE = {
    "nothing left": cut(0.0), "cut early": cut(0.1), "cut in the middle": cut(0.5), "cut at the end": cut(0.98),
    "renamed to another rank": rename("importance_00001_of_00002.pt"),
    "renamed to more ranks": rename("importance_00000_of_00002.pt"),
    "renamed to no name of ours": rename("importance_final.pt"),
    "another file": beside("importance_00000_of_00003.pt"),
    "a copy": beside("importance_copy.pt"),
    "another rank's": put(1, "rank"),
    "without a sampler": damage(lambda state: state.pop("sampler")),
    "without settings": damage(lambda state: state.pop("settings")),
    "a list of settings": put([1], "settings"),
    "without what was learnt": damage(lambda state: state.pop("effective")),
    "without the memory": damage(lambda state: state["sampler"].pop("memory")),
    "importances cut": short("sampler", "memory", "importance"),
    "one importance": put(torch.ones(1), "sampler", "memory", "importance"),
    "importances of another type": put(ALL, "sampler", "memory", "importance"),
    "importances in a list": put(ALL.tolist(), "sampler", "memory", "importance"),
    "record cut": short("sampler", "record", "visits"),
    "one loss": put(torch.ones(1), "sampler", "record", "total_loss"),
    "rates cut": put(torch.ones(99), "sampler", "visits", "rate"),
    "visits of nobody": put(torch.full((3,), 40, dtype=torch.int32), "sampler", "visits", "index"),
    "visits below 0": put(torch.full((3,), -1, dtype=torch.int32), "sampler", "visits", "index"),
    "credits cut": put(torch.zeros(20), "sampler", "visits", "credit"),
    "passes in words": put("two", "sampler", "visits", "passes"),
    "no floor": put(None, "sampler", "visits", "floor"),
    "evidence cut": short("sampler", "visits", "guard", "second_moments"),
    "moments cut": short("sampler", "moments"),
    "draws of nobody": put([(3, [99], [1.0], [1.0])], "sampler", "outstanding"),
    "draws without weights": put([(3, [1, 2], [1.0, 1.0], [])], "sampler", "outstanding"),
    "a draw in words": put(["draw"], "sampler", "outstanding"),
    "progress in words": put("all", "effective", "progress", "value"),
    "progress cut": short("effective", "progress", "sums"),
    "gradients of another kind": put(torch.ones(3, 3), "effective", "gradients", "last"),
    "what was measured until then, cut": short("effective", "measured_until"),
    "sums that are due, cut": put(torch.ones(1), "effective", "pending"),
    "a forecast in words": put("soon", "effective", "forecast"),
    "an objective without its parts": put({}, "objective"),
    "an objective in words": put("yes", "objective", "looked"),
    "less than no draws": put(-1, "sampler", "draws"),
    "less than no passes": put(-3, "sampler", "visits", "passes"),
    "a distribution of two numbers": put([(1.0, torch.ones(2), torch.ones(101))], "sampler", "record", "distributions"),
    "logs in words": put({"visits": "many"}, "reported"),
    "a name of too many ranks": rename("importance_99999_of_99999999999.pt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return straight(tmp_path_factory.mktemp("whole"), max_steps=8)


@pytest.mark.parametrize("case", DAMAGE)
def test_no_damage_is_loaded(tmp_path, whole, case):
    """It says which checkpoint, what is wrong, and the way out; and nothing is drawn."""
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-7", tmp_path / "checkpoint-7")
    (path,) = (tmp_path / "checkpoint-7").glob("importance_*.pt")
    DAMAGE[case](path)
    with pytest.raises(
        ValueError, match=r"(cannot be read|cannot be used) .*\(.+\)\. Resume from another checkpoint, or "
    ):
        resumed(tmp_path, 7, max_steps=8)
    for left in (tmp_path / "checkpoint-7").glob("importance_*.pt"):  # what the message says
        left.unlink()
    assert resumed(tmp_path, 7, max_steps=8).state.global_step == 8


def test_control_the_checkpoint_itself_is_loaded(tmp_path, whole):
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-7", tmp_path / "checkpoint-7")
    assert same_training(resumed(tmp_path, 7, max_steps=8), whole)


# ---- other data, other settings --------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Reads each example with its own noise, as random augmentation does."""

    def __init__(self, rows, generator=None):
        self.rows, self.generator = rows, generator

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        mask = torch.rand(tiny.LENGTH, generator=self.generator) < 0.9
        return {**self.rows[i], "attention_mask": mask.long()}


def as_dataset(rows):
    return datasets.Dataset.from_list([{k: torch.as_tensor(v).tolist() for k, v in row.items()} for row in rows])


def shuffled(rows):
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()]


def relabelled(rows):
    return [{**row, "labels": (row["labels"] + (i == 20)) % tiny.CLASSES} for i, row in enumerate(rows)]


def rewritten(rows):
    return [{**row, "input_ids": row["input_ids"].flip(0)} for row in rows]


KINDS = {"rows": list, "torch": Rows, "datasets": as_dataset}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [shuffled, relabelled, rewritten])
def test_importances_are_not_given_to_other_data(tmp_path, warnings_of, kind, change):
    make = KINDS[kind]
    first = straight(tmp_path, data=make(tiny.texts()))
    (state,) = load_states(tmp_path / "checkpoint-14")
    again = resumed(tmp_path, 14, data=make(change(tiny.texts())))
    names = {"shuffled": "input_ids, labels differ", "relabelled": "labels differs", "rewritten": "input_ids differs"}
    assert f"different training data ({names[change.__name__]}): importances start unknown" in warnings_of[0]
    seen = again._sampler.record.columns()["visits"]
    assert seen.sum() == 8 * len(again.draws) < state["sampler"]["record"]["visits"].sum()
    assert again.importances.isfinite().sum() == (seen > 0).sum() < first.importances.isfinite().sum()


def test_damage_is_not_joined_either(tmp_path, whole):
    """Importances and record are kept with changed settings."""
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-7", tmp_path / "checkpoint-7")
    (path,) = (tmp_path / "checkpoint-7").glob("importance_*.pt")
    put(torch.ones(1), "sampler", "record", "total_loss")(path)
    with pytest.raises(ValueError, match=r"cannot be used .*total_loss must be a float32 tensor of shape \[40\]"):
        resumed(tmp_path, 7, {"weight_exponent": 0.5}, max_steps=8)


class Features:
    """A row that is an object, as in some libraries."""

    def __init__(self, row):
        vars(self).update(row)


class Epochs(Rows):
    """A dataset whose rows depend on the epoch."""

    def set_epoch(self, epoch):
        self.rows = [{**row, "input_ids": (row["input_ids"] + epoch) % tiny.WORDS} for row in tiny.texts()]


class Broken(Rows):
    def __getitem__(self, i):
        raise OSError("the disk is gone")


def dotted(rows):
    return [{**row, "words": numpy.array(["a", None, str(i)], dtype=object)} for i, row in enumerate(rows)]


def test_fingerprints():
    rows = tiny.texts(300)
    edited = [{**row, "labels": (row["labels"] + (i == 100)) % tiny.CLASSES} for i, row in enumerate(rows)]
    tokens = [[i % 3, 1, 2] for i in range(300)]
    others = [[0, 0, 0] if i == 101 else row for i, row in enumerate(tokens)]
    many = {"text": ["long " * 4000] * 300}  # so that not all rows are read
    for a, b, what in (
        (rows, edited, "labels differs"),
        (list(map(Features, rows)), list(map(Features, edited)), "labels differs"),
        (*(datasets.Dataset.from_dict({**many, "labels": labels}) for labels in (tokens, others)), "labels differs"),
        (rows, [{"x": 1}] * 300, r"columns ['attention_mask', 'input_ids', 'labels'], now ['x']"),
    ):
        assert differences(fingerprint(a), fingerprint(b)) == what
        assert differences(fingerprint(a), fingerprint(a)) == ""
    assert differences(fingerprint(dotted(rows)), fingerprint(dotted(rows))) == "", "of objects only addresses differ"
    assert fingerprint(Broken(rows)) == {"datasets": None, "columns": {}}
    assert fingerprint([{"x": torch.eye(3).to_sparse()}]) == {"datasets": None, "columns": {}}


def test_fingerprints_leave_generators_alone():
    data = Rows(tiny.texts(), torch.Generator().manual_seed(1))
    state = data.generator.get_state()
    fingerprint(data)
    assert torch.equal(data.generator.get_state(), state)
    data[0]
    assert not torch.equal(data.generator.get_state(), state), "control"


def test_data_that_know_their_epoch(tmp_path, warnings_of):
    straight(tmp_path, data=Epochs(tiny.texts()))
    resumed(tmp_path, 14, data=Epochs(tiny.texts()))
    assert warnings_of == []


def test_another_loss_is_looked_at_again(tmp_path):
    """The checks on the first batch are valid for their loss only."""

    def resume_with(function):
        more = {} if function is None else {"per_example_loss_func": function}
        run = tiny.trainer(tmp_path / "again", tiny.WithoutConfig(scale=1.1), tiny.texts(), more=more, max_steps=6)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        return run

    def scaled(outputs, labels):
        return 1.1 * torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    more = {"per_example_loss_func": scaled}
    tiny.trained(tmp_path, tiny.WithoutConfig(scale=1.1), tiny.texts(), more=more, max_steps=5, **SAVING)
    with pytest.raises(ValueError, match="the model has its own loss"):
        resume_with(None)
    assert resume_with(scaled).state.global_step == 6


@pytest.mark.parametrize("kind", KINDS)
def test_control_the_same_data_go_on(tmp_path, warnings_of, kind):
    """Loaded again, and by `datasets` with another fingerprint."""
    make = KINDS[kind]
    whole = straight(tmp_path, data=make(tiny.texts()))
    again = resumed(tmp_path, 14, data=make([dict(row) for row in tiny.texts()]))
    assert warnings_of == []
    torch.testing.assert_close(again.importances, whole.importances, rtol=0.5, atol=0.5)
    assert again._sampler.record.columns()["visits"].sum() == whole._sampler.record.columns()["visits"].sum()


def test_noise_of_its_own_is_not_taken_for_other_data(tmp_path, warnings_of):
    straight(tmp_path, data=Rows(tiny.texts(), torch.Generator().manual_seed(1)))
    resumed(tmp_path, 7, data=Rows(tiny.texts(), torch.Generator().manual_seed(2)))
    assert warnings_of == []


OTHER = {
    "memory_momentum": 0.5, "uniform_fraction": 0.6, "weight_exponent": 0.5, "prune_mass": 0.1,
    "importance_increment": 0.01, "budget": 0.8, "seed": 5, "sampling": "replacement",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_new_settings_hold(tmp_path, warnings_of, name):
    """With the available importances."""
    straight(tmp_path, tiny.FIXED)
    (state,) = load_states(tmp_path / "checkpoint-7")
    again = resumed(tmp_path, 7, {**tiny.FIXED, name: OTHER[name]})
    before = {**asdict(ImportanceConfig(**tiny.FIXED)), "seed": 42}[name]
    assert f"was written with {name}={before!r} (now {OTHER[name]!r}): importances are kept" in warnings_of[0]
    assert set(again.draws[0].rate) != {1.0}, "what was learnt is used"
    visits = state["sampler"]["record"]["visits"].sum()
    assert again._sampler.record.columns()["visits"].sum() == visits + sum(len(draw.index) for draw in again.draws)
    if name == "uniform_fraction":
        assert max(again.draws[0].weight) <= 1 / 0.6 + 1e-6
        assert again._sampler.visits.floor >= 0.6


def test_another_measure_starts_afresh(tmp_path, warnings_of):
    straight(tmp_path, tiny.FIXED)
    again = resumed(tmp_path, 7, {**tiny.FIXED, "metric": "loss"})
    assert "metric='logit_gradient' (now 'loss'), a different metric: importances start unknown" in warnings_of[0]
    assert set(again.draws[0].rate) == {1.0}


def test_record_may_be_switched_off(tmp_path, warnings_of):
    whole = straight(tmp_path)
    again = resumed(tmp_path, 7, {"record": False})
    assert warnings_of == []
    assert tiny.difference(whole, again) == 0.0


def test_other_number_of_examples(tmp_path, warnings_of):
    straight(tmp_path)
    again = resumed(tmp_path, 7, tiny.FIXED, data=tiny.texts(48))
    assert "40 training examples, but train_dataset now has 48" in warnings_of[0]
    assert again.state.global_step == 18
    assert set(again.draws[0].weight) == {1.0}, "nothing is known"


def test_other_batch_size(tmp_path, warnings_of):
    """The importances are kept; 20 batches of 2 per epoch, of which the first 7 are skipped."""
    straight(tmp_path)
    (state,) = load_states(tmp_path / "checkpoint-7")
    again = resumed(tmp_path, 7, tiny.FIXED, per_device_train_batch_size=2)
    assert "a different number of processes, batch size" in warnings_of[0]
    visits = state["sampler"]["record"]["visits"].sum()
    assert again._sampler.record.columns()["visits"].sum() == visits + 2 * len(again.draws)
    assert [draw.number for draw in again.draws] == list(range(53))
    assert set(again.draws[0].weight) != {1.0}, "what was learnt is used"
    rate = rates(state["sampler"]["memory"]["importance"].double(), 0.3, 64.0)
    for draw in again.draws[:2]:  # of the first segment
        assert draw.weight == pytest.approx((1 / rate[draw.index]).tolist(), rel=1e-5)


def test_other_batch_size_goes_on_with_what_was_learnt(tmp_path, warnings_of):
    """In epochs, because the steps differ in size."""
    straight(tmp_path, **QUICK)
    (state,) = load_states(tmp_path / "checkpoint-30")
    again = resumed(tmp_path, 30, **{**QUICK, "per_device_train_batch_size": 2})
    assert "a different number of processes, batch size" in warnings_of[0]
    progress = again._effective.progress
    first = tiny.logged(again, "importance/effective_epoch")[30]
    learnt = state["effective"]["progress"]["value"] / 6
    assert learnt < first < learnt + 0.2
    assert learnt > 5.05, "control: the steps alone would be 5 epochs"
    assert progress.steps == 8 * 12
    assert progress.finished


def test_larger_batches_end_with_the_learning_rate_at_its_end(tmp_path, warnings_of):
    """`Trainer` then counts more epochs than were effective; training must not end too early."""
    straight(tmp_path, **QUICK)
    again = resumed(tmp_path, 12, **{**QUICK, "per_device_train_batch_size": 12})
    assert again._effective.progress.finished
    assert tiny.logged(again, "learning_rate")[-1] < 2e-2 * 2 / 16


def test_from_a_fixed_budget_to_auto_and_back(tmp_path, warnings_of):
    """Each step of a fixed budget counts as one, and effective steps are ignored."""
    straight(tmp_path / "fixed", tiny.FIXED)
    again = resumed(tmp_path / "fixed", 7)
    assert tiny.logged(again, "importance/effective_epoch")[0] == pytest.approx(8 / 5, abs=0.1)
    assert again._effective.progress.finished
    straight(tmp_path / "auto")
    again = resumed(tmp_path / "auto", 7, tiny.FIXED)
    assert again.state.global_step == 15
    assert again._effective is None
    assert warnings_of == []


# ---- which checkpoint ------------------------------------------------------------------------------------------------


def test_newest_complete(tmp_path):
    assert newest_complete(tmp_path) is None
    for step, content in ((5, "{}"), (10, "{}"), (15, '{"global_s'), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-notes").mkdir()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_resume_takes_the_newest_complete_checkpoint(tmp_path, warnings_of):
    whole = straight(tmp_path)
    for step in range(8, 16):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    shutil.copytree(tmp_path / "checkpoint-7", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()  # killed while saving
    run = tiny.trainer(tmp_path, tiny.bert(**MODEL), tiny.texts(), Recorder, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert len(run.draws) == 8
    assert tiny.difference(run, whole) == 0.0
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8


def test_resume_with_nothing_complete_starts_anew(tmp_path, warnings_of):
    whole = straight(tmp_path, max_steps=4)
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    run = tiny.trainer(tmp_path, tiny.bert(**MODEL), tiny.texts(), Recorder, **SAVING, max_steps=4)
    run.train(resume_from_checkpoint=True)
    assert "has no complete checkpoint: training starts from scratch" in warnings_of[0]
    assert tiny.difference(run, whole) == 0.0


def test_resume_without_checkpoints_is_refused_by_trainer(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run.train(resume_from_checkpoint=True)


def test_half_written_file_is_not_taken(tmp_path, monkeypatch):
    straight(tmp_path, max_steps=3)
    before = load_states(tmp_path / "checkpoint-2")[0]["sampler"]["draws"]

    def half(_, file):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="full"):
        save_state(tmp_path / "checkpoint-2", 0, 1, {"sampler": {"draws": -1}})
    monkeypatch.undo()
    assert load_states(tmp_path / "checkpoint-2")[0]["sampler"]["draws"] == before


# ---- faults and detours ----------------------------------------------------------------------------------------------


class Faulty(torch.utils.data.Dataset):
    def __init__(self, fails_at):
        self.rows, self.asked, self.fails_at = tiny.texts(), 0, fails_at

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.asked += 1
        if self.asked == self.fails_at:
            raise OSError("the disk is gone")
        return self.rows[i]


def test_exception_inside_the_data_keeps_the_last_checkpoint(tmp_path):
    whole = straight(tmp_path)
    (tmp_path / "second").mkdir()
    run = tiny.trainer(tmp_path / "second", tiny.bert(**MODEL), Faulty(fails_at=2 * 40 + 75), Recorder, **SAVING)
    with pytest.raises(OSError, match="the disk is gone"):
        run.train()
    assert run.importances.isfinite().any()
    again = tiny.trainer(tmp_path / "second", tiny.bert(**MODEL), tiny.texts(), Recorder, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert 0 < len(again.draws) < 15
    assert tiny.difference(again, whole) == 0.0

"""The way of a batch through the package: functions, files and operations of a step. Nothing here depends on time."""

import ast
import sys
from collections import Counter
from pathlib import Path

import tiny
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

import hf_importance
from hf_importance import ImportanceTrainer

PACKAGE = Path(hf_importance.__file__).parent
FUNCTIONS, FILES, STATEMENTS = 15, 6, 6
"""At most so many functions of at least six statements, in so many files; smaller ones are read at a glance."""
OPERATIONS = 55
"""Operations of a step beyond those of `Trainer`, at most."""
STEP = 12
"""A step after the checks on the first batch, in which no segment is planned and nothing is remembered."""


def statements(file, name):
    """Number of statements of a function, without its docstring."""
    node = ast.parse((PACKAGE / file).read_text())
    for part in name.replace(".<locals>", "").split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next(x for x in ast.walk(node) if isinstance(x, kinds) and x.name == part)
    return sum(isinstance(x, ast.stmt) for x in ast.walk(node)) - 1 - (ast.get_docstring(node) is not None)


class Calls(ImportanceTrainer):
    """Records the functions of the package that are called for one batch: from its draw to its loss."""

    def get_batch_samples(self, *args, **kwargs):
        if self.state.global_step != STEP:
            return super().get_batch_samples(*args, **kwargs)
        self.calls = set()
        sys.setprofile(self.note)
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            sys.setprofile(None)

    def training_step(self, *args, **kwargs):
        sys.setprofile(self.note if self.state.global_step == STEP else None)
        try:
            return super().training_step(*args, **kwargs)
        finally:
            sys.setprofile(None)

    def note(self, frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            self.calls.add((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname))


def test_a_batch_goes_through_few_functions_and_files(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), Calls, per_device_train_batch_size=1, max_steps=20)
    run.train()
    called = {(file, name) for file, name in run.calls if "<" not in name.split(".")[-1]}
    read = {(file, name) for file, name in called if statements(file, name) >= STATEMENTS}
    assert len(read) <= FUNCTIONS, sorted(read)
    assert len({file for file, _ in read}) <= FILES, sorted(read)
    assert len(called) <= 2 * FUNCTIONS + 6, sorted(called)  # with one for the backward pass, and five for rows
    functions = {name for _, name in called}
    assert "ImportanceBatchSampler._draw" in functions, "control: the draw was seen"
    assert "cross_entropy" in functions, "control: the loss was seen"


class Profiled(TrainerCallback):
    """Counts the operations from the begin of a step to its end."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == STEP:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == STEP + 1:
            self.profiler.__exit__(None, None, None)
            events = [e for e in self.profiler.events() if e.name.startswith("aten::")]
            self.operations = Counter(e.name for e in events if e.cpu_parent is None or "aten" not in e.cpu_parent.name)


def operations(tmp_path, cls, **settings):
    profiled = Profiled()
    settings = {"per_device_train_batch_size": 1, "max_steps": 20, **settings}
    tiny.trained(tmp_path, tiny.bert(), tiny.texts(), cls, more={"callbacks": [profiled]}, **settings)
    return profiled.operations


def test_a_step_needs_few_operations_more_than_with_trainer(tmp_path):
    plain, ours = operations(tmp_path, tiny.Plain), operations(tmp_path, ImportanceTrainer)
    assert ours["aten::softmax"] > plain["aten::softmax"], "control: importances are measured"
    more = ours - plain
    assert sum(more.values()) - sum((plain - ours).values()) <= OPERATIONS, more.most_common()


def test_nothing_more_is_read_back_from_the_device_in_a_step(tmp_path):
    """Each `item` would wait for a GPU. One is only made on a CPU: whether all examples have a class."""
    plain, ours = operations(tmp_path, tiny.Plain), operations(tmp_path, ImportanceTrainer)

    def waits(counts):
        return counts["aten::item"] + counts["aten::is_nonzero"]

    assert waits(ours) <= waits(plain) + 1
    assert waits(plain) > 0, "control: they are seen"

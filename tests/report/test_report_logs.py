"""Logs and messages in the console and in TensorBoard."""

import logging

import pytest
import tiny
from transformers import PrinterCallback, ProgressCallback

from hf_importance.report.logs import CONSOLE


@pytest.mark.parametrize("bar", [True, False])
def test_console_shows_only_two_of_the_importance_logs(tmp_path, capsys, bar):
    class CustomPrinter(PrinterCallback):
        pass

    trainer = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(), disable_tqdm=not bar)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert any(issubclass(kind, ProgressCallback) for kind in kinds) == bar
    trainer.train()
    printed = capsys.readouterr().out
    logged = {name for log in trainer.state.log_history for name in log if name.startswith("importance/")}
    assert len(logged) == 8
    assert {name for name in logged if f"'{name}'" in printed} == set(CONSOLE) & set(logged)
    trainer = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(), more={"callbacks": [CustomPrinter()]})
    trainer.train()
    assert "'importance/known'" in capsys.readouterr().out, "custom callbacks get all logs"


def test_messages_go_to_stdout_or_the_configured_logging(tmp_path, capsys, caplog):
    messages, root = logging.getLogger("hf_importance.messages"), logging.getLogger()
    handlers, root.handlers = root.handlers, []  # as in a program without logging configuration
    try:
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
        assert "Importance sampling: 8 visits of 40 examples" in capsys.readouterr().out
        messages.setLevel(logging.WARNING)
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
        assert "Importance sampling" not in capsys.readouterr().out, "silenced by the level"
    finally:
        root.handlers = handlers
        messages.setLevel(logging.INFO)
    tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    assert "Importance sampling: 8 visits" in caplog.text
    assert "Importance sampling: 8 visits" not in capsys.readouterr().out


def test_tensorboard_has_all_importance_logs(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    names = {log for logs in trainer.state.log_history for log in logs if log.startswith("importance/")}
    assert len(names) == 8
    for name in names:
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        logged = {log["step"]: log[name] for log in trainer.state.log_history if name in log}
        assert written == pytest.approx(logged, rel=1e-6)
        assert len(written) == 3

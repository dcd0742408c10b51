"""Messages during training, and the part of the logs that the console shows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

CONSOLE = ("importance/variance_ratio", "importance/effective_epoch")
"""Logs of ours that are shown in the console; TensorBoard and others get all of them."""


class _ConsoleHandler(logging.Handler):
    """Writes to stdout, above the progress bar, unless the program has configured logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            tqdm.write(self.format(record), file=sys.stdout)


_logger = logging.getLogger("hf_importance.messages")
_logger.setLevel(logging.INFO)
_logger.addHandler(_ConsoleHandler())


def say(line: str) -> None:
    """Show a message through the logger `hf_importance.messages`; set its level to silence it."""
    _logger.info(line)


def limit_console_logs(callbacks: Iterable[TrainerCallback]) -> None:
    """Make the printing callbacks of transformers show only `CONSOLE` of our logs."""
    for callback in callbacks:
        if type(callback) in (ProgressCallback, PrinterCallback):
            callback.on_log = partial(_shortened, callback.on_log)


def _shortened(on_log: Callable[..., Any], *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    shown = {name: value for name, value in (logs or {}).items() if not name.startswith("importance/")}
    shown |= {name: logs[name] for name in CONSOLE if logs and name in logs}
    return on_log(*args, logs=shown, **kwargs)

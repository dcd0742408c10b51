"""What is logged while a model is trained, and what of it the console shows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

CONSOLE = ("importance/variance_ratio", "importance/effective_epoch")
"""Of what is logged, these are shown in the console; TensorBoard and the like have all of it."""


class _ConsoleHandler(logging.Handler):
    """Writes to stdout, above the progress bar, unless whoever runs the program has set up logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            tqdm.write(self.format(record), file=sys.stdout)


_logger = logging.getLogger("hf_importance.told")
_logger.setLevel(logging.INFO)
_logger.addHandler(_ConsoleHandler())


def say(line: str) -> None:
    """Tell people, through the logger `hf_importance.told`: seen by default, and silenced by setting its level."""
    _logger.info(line)


def limit_console_logs(callbacks: Iterable[TrainerCallback], *more: type[TrainerCallback]) -> None:
    """Let those of transformers that print show only [`CONSOLE`] of what is ours.

    Args:
        callbacks: of a trainer.
        more: kinds of callbacks that print, beside those of transformers.
    """
    for callback in callbacks:
        if type(callback) in (ProgressCallback, PrinterCallback, *more):
            callback.on_log = partial(_shortened, callback.on_log)


def _shortened(on_log: Callable[..., Any], *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    shown = {name: value for name, value in (logs or {}).items() if not name.startswith("importance/")}
    shown |= {name: logs[name] for name in CONSOLE if logs and name in logs}
    return on_log(*args, logs=shown, **kwargs)

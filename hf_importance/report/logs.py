"""Messages during training, and the part of the logs that the console shows."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

CONSOLE = ("importance/variance_ratio", "importance/effective_epoch", "importance/backward_fraction")
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
            callback.on_log = _with_few_logs(callback.on_log)


def _with_few_logs(on_log: Any) -> Any:
    def limited(*args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        shown = {k: v for k, v in (logs or {}).items() if k in CONSOLE or not k.startswith("importance/")}
        return on_log(*args, logs=shown, **kwargs)

    return limited

"""Settings and fixtures of all tests: offline, quiet, one thread, a fixed seed."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_repeatable():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection():
    """`Trainer` collects garbage when training starts, which is most of the time of a short training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_gains(monkeypatch):
    """Enable importance sampling even if it saves less than a tenth of the cost, as with tiny token models."""
    monkeypatch.setattr("hf_importance.sampling.guard._MAX_RELATIVE_SPENDING", 1.0)


@pytest.fixture
def dropping_rows(monkeypatch):
    """Selective backward keeps about half of the rows, from the second batch on."""
    from hf_importance.backward import threshold

    def adapt(self, norm):
        self.value, self.kept = 2 * norm.mean().item(), 0.5

    monkeypatch.setattr(threshold, "_FIRST", 1)
    monkeypatch.setattr(threshold, "_EVERY", 1)
    monkeypatch.setattr(threshold.Threshold, "_adapt", adapt)

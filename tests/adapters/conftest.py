"""Fixtures of the tests of sentence-transformers, and detailed assertion messages of the helper modules."""

import gc

import pytest

pytest.register_assert_rewrite("sentence_trainers", "trl_trainers")


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """Folder of the tiny models for [`sentence_trainers.load_model`]."""
    from sentence_trainers import save_models  # skips the test if sentence-transformers is not installed

    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def frozen_garbage():
    """Exclude existing objects from garbage collection: each training collects, which takes as long as the training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

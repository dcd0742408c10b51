"""Trainings that are shared by tests, and the warnings of a test."""

import logging

import pytest
from resuming import train


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """`train` without a folder, once for the same arguments. Copy a checkpoint of it before changing it."""
    runs = {}

    def train_once(importance=None, **settings):
        key = repr((importance, sorted(settings.items())))
        if key not in runs:
            runs[key] = train(tmp_path_factory.mktemp("uninterrupted"), importance, **settings)
        return runs[key]

    return train_once


@pytest.fixture
def warned(caplog):
    """A function for the warnings of this library so far."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("hf_importance")
    ]

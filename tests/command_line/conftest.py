"""Fixtures of the tests of the language modeling script."""

import pytest
from transformers import LlamaConfig


@pytest.fixture
def tiny_config(tmp_path):
    """Flags that train a tiny model from scratch."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaConfig(**size, max_position_embeddings=64, initializer_range=0.3).save_pretrained(tmp_path / "config")
    return {"config_name": tmp_path / "config", "max_seq_length": 48}

"""Data, short runs and parameters of language models for tests of the scripts."""

import run_language_modeling
from runs import flags, write

main = run_language_modeling.main


def dishes(n=12):
    """Rows of prompts and completions."""
    words = ("soup", "bread", "fish", "rice")
    return [
        {
            "prompt": f"Table {i} had the {words[i % 4]}.",
            "completion": f" It was {'cold' if i % 3 else 'good and hot'}.",
        }
        for i in range(n)
    ]


def train(tmp_path, model, rows, *more, **changes):
    """Train on rows and return the trainer.

    Args:
        tmp_path: folder of the data and the output.
        model: flags of the model.
        rows: training and validation data.
        *more: flags without a value.
        **changes: flags with a value.
    """
    file = write(tmp_path / "train.json", rows)
    given = {"train_file": file, "validation_file": file, **model, **changes}
    return main([*flags(tmp_path, **given), "--do_train", *more])


def parameters_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}

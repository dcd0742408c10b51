"""Runs `run_text_classification.py` several times, pushing to the Hub at `HF_ENDPOINT`."""

import json
import runpy
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_text_classification.py"


def main(folder, runs):
    time.sleep = lambda seconds: None  # the client sleeps between retries
    for name, flags in runs.items():
        sys.argv = [
            SCRIPT.name,
            *("--train_file", str(folder / "train.csv"), "--output_dir", str(folder / name), "--hub_model_id", name),
            *("--do_train", "--push_to_hub", "--report", "--num_train_epochs", "2"),
            *("--per_device_train_batch_size", "8", "--max_seq_length", "16", "--logging_steps", "2"),
            *("--save_strategy", "no", "--disable_tqdm", "true", *flags),
        ]
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            outcome = "pushed"
        except SystemExit as stop:
            outcome = str(stop.code)
        (folder / f"{name}.txt").write_text(outcome)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""Short runs of the fine-tuning scripts, and their output files."""

import json

import datasets

SHORT = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--use_cpu", "true"]


def flags(tmp_path, **more):
    """Flags of a run of three steps with the output folder `run`."""
    given = {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", **more}
    return [*SHORT, *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def results(tmp_path):
    """All metrics of a run."""
    return json.loads((tmp_path / "run" / "all_results.json").read_text())


def predictions(tmp_path):
    """Predictions of a run, in order."""
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def write(path, rows):
    """Write rows in the format of the file extension, and return the path."""
    data = datasets.Dataset.from_list(rows)
    {"csv": data.to_csv, "json": data.to_json, "jsonl": data.to_json, "parquet": data.to_parquet}[path.suffix[1:]](path)
    return path

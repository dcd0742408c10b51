"""The table and the plot of finished runs."""

import json
import re

import compare_runs
import pytest
import run_image_classification
from language_modeling_runs import dishes, train
from PIL import Image
from runs import flags


def test_table_has_the_means_over_seeds_and_the_plot_is_saved(tmp_path):
    expected = {}
    for trainer in ("importance", "uniform"):
        for seed in (1, 2):
            more = {"trainer": trainer, "seed": seed, "max_train_samples": 40, "max_eval_samples": 20}
            more["output_dir"] = tmp_path / "runs" / "digits" / f"{trainer}-{seed}"
            run_image_classification.main(flags(tmp_path, eval_strategy="steps", eval_steps=1, **more))
            found = json.loads((more["output_dir"] / "all_results.json").read_text())
            expected.setdefault(trainer, []).append(found["eval_accuracy"])
    lines = compare_runs.main([str(tmp_path / "runs")]).splitlines()
    assert lines[0].split()[:4] == ["task", "trainer", "seeds", "accuracy"]
    for line, trainer in zip(lines[2:], ("uniform", "importance"), strict=True):
        mean = sum(expected[trainer]) / 2
        cells = re.split(r"  +", line)
        assert cells[:3] == ["digits", trainer, "2"]
        assert cells[3].startswith(f"{mean:.4f} ± ")
        assert cells[5:7] == ["12", "100%"]
    with Image.open(tmp_path / "runs" / "comparison.png") as picture:
        assert picture.width > 400


def test_table_of_language_models_has_perplexity_and_loss(tmp_path, tiny_config):
    for trainer in ("importance", "uniform"):
        folder = {"output_dir": tmp_path / "runs" / "dishes" / trainer}
        more = {"trainer": trainer, "eval_strategy": "steps", "eval_steps": 1}
        train(tmp_path, tiny_config, dishes(), "--do_eval", **folder, **more)
    found = json.loads((tmp_path / "runs" / "dishes" / "uniform" / "all_results.json").read_text())
    lines = compare_runs.main([str(tmp_path / "runs")]).splitlines()
    assert lines[0].split()[:5] == ["task", "trainer", "seeds", "perplexity", "loss"]
    expected = [f"{found['eval_perplexity']:.4f}", f"{found['eval_loss']:.4f}"]
    assert lines[2].split()[:5] == ["dishes", "uniform", "1", *expected]
    run = compare_runs.read_run(tmp_path / "runs" / "dishes" / "uniform")
    assert run["curve_metric"] == "loss"
    assert [examples for examples, _ in run["curve"]] == [4, 8, 12]


def test_curve_and_share_of_steps_of_runs_that_end_early():
    curves = [[(10, 0.2), (20, 0.4), (30, 0.6)], [(10, 0.4), (14, 0.8)]]
    for found, point in zip(compare_runs.mean_curve(curves), [(10, 0.3), (22, 0.7)], strict=True):
        assert found == pytest.approx(point)
    assert compare_runs.mean_curve(curves[:1]) == curves[0], "control: one run"
    run = {"task": "digits", "loss": 0.5, "examples": 9, "seconds": 1.0, "accuracy": 0.9, "curve_metric": "accuracy"}
    runs = [run | {"trainer": "uniform", "steps": 40}, run | {"trainer": "importance", "steps": 30}]
    assert [re.split(r"  +", line)[6] for line in compare_runs.table(runs).splitlines()[2:]] == ["100%", "75%"]
    assert compare_runs.conclusions(runs) == [
        "digits: importance sampling took 75% of the steps of Trainer; accuracy +0.0000"
    ]
    assert compare_runs.conclusions(runs[1:]) == []
    only_row = compare_runs.table(runs[1:]).splitlines()[2]
    assert re.split(r"  +", only_row)[5] == "9", "without a uniform run there is no share of steps"


def test_folders_without_runs_are_an_error(tmp_path):
    with pytest.raises(SystemExit, match="must contain finished runs"):
        compare_runs.main([str(tmp_path)])

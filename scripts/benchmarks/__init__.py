"""The parts of `scripts/benchmark.py`.

- `results`: files of results.
- `tasks`: data, model and full training of each task.
- `methods`: importance sampling and rival methods behind one interface.
- `accuracy`, `seconds`, `overhead`, `draws`, `label_errors`, `suspects`: the measurements.
- `fine_tuning`, `backward`, `families`: those of selective backward; `fine_tuning_tasks` has data and models of the
  first, `fine_tuning_tables` what `Trainer` and ours took.
"""

"""The parts of `scripts/benchmark.py`.

- `results`: files of results.
- `tasks`: data, model and full training of each task.
- `methods`: importance sampling and rival methods behind one interface.
- `accuracy`, `overhead`, `draws`, `label_errors`: the measurements.
"""

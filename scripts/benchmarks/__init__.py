"""The parts of `scripts/benchmark.py`.

- `results`: files of results.
- `tasks`: data, models, full trainings.
- `methods`: ours and its rivals behind one interface.
- `accuracy`, `overhead`, `draws`, `label_errors`: what is measured.
"""

"""Report on the training data: logs, page, files and model card.

- `texts`: makes texts safe to display.
- `tokens`: losses of the tokens of an example.
- `findings`: the figures. Pure tensors.
- `plots`: plots of the figures.
- `examples`: how an example is displayed.
- `duplicates`: duplicate texts with different labels.
- `page`: the report as a page and as files.
- `hub`: the section of the model card, and errors of pushing.
- `logs`: what the console shows.
- `training`: the figures of a training run for logs and report.
"""

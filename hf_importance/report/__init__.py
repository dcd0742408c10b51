"""Report on the training data: logs, page, files and model card.

- `columns`: per-example columns, gathered from all processes.
- `texts`: makes texts safe to display.
- `tokens`: losses of the tokens of an example.
- `findings`: the figures. Pure tensors.
- `pictures`: thumbnails.
- `plots`: plots of the figures.
- `duplicates`: duplicate texts with different labels.
- `tables`: examples, classes and confusions as tables.
- `examples`: how an example is displayed.
- `hub`: the section of the model card, and errors of pushing.
- `logs`: what the console shows.
- `training`: the figures of a training run for logs and report.
- `page`: the report as a page and as files; imports what only the extra `report` installs when it writes them.
"""

"""What was learnt about the data: for people to look at.

- `texts`: as a page and a file can hold them.
- `tokens`: which of them cost most.
- `findings`: the figures. Pure tensors.
- `plots`: the figures as pictures.
- `examples`: one example as it is shown.
- `duplicates`: equal texts with different labels.
- `page`: all of it as one page and as files.
- `hub`: the part of the model card, and pushing.
- `logs`: what the console shows.
- `training`: what the report is told of a training.
- `hooks`: into `Trainer`.
"""

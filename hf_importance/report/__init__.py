"""What was learnt about the data: for people to look at.

- `findings`: the figures. Pure tensors.
- `plots`: the figures as pictures.
- `page`: the examples, and all of it as one page and as files.
- `hub`: the part of the model card, and pushing.
- `hooks`: into `Trainer`.
"""

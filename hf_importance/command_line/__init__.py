"""What the scripts that fine-tune share. They import it from here, so that each of them can be copied alone.

It needs the packages of the extra `scripts`; nothing else in the library imports it.

- `arguments`: flags, of the model, the data, training and importance sampling.
- `metrics`: accuracy, F1, squared error and correlation, by `evaluate`.
- `embedded_data`: data that every machine with these packages has.
- `data_sets`: files or a data set, splits, columns.
- `completions`: tokens of prompts and completions, and the model's own completions.
- `labels`: their column, names and numbers, and predictions of them.
- `fine_tuning`: the model, the trainer, and what is done with it.
- `lora`: adapters instead of the whole model.
"""

"""Code shared by the fine-tuning scripts, so that each script can be copied on its own.

Requires the packages of the extra `scripts`; nothing else in the library imports it.

- `arguments`: flags of the model, the data, training and importance sampling.
- `metrics`: accuracy, F1, mean squared error and Pearson correlation, as `evaluate` metrics.
- `embedded_data`: datasets built from installed packages, without network access.
- `data_files`: loading of data files or a dataset, and choice of splits and columns.
- `completions`: tokenization of prompts and completions, and generation.
- `labels`: label columns, names and ids, and predictions.
- `fine_tuning`: loading of the model, training, evaluation and prediction.
- `lora`: LoRA adapters.
"""

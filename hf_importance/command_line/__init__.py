"""Code shared by the fine-tuning scripts, which import it from here so that each can be copied on its own.

It requires the packages of the extra `scripts`; nothing else in the library imports it.

- `arguments`: flags of the model, the data, training and importance sampling.
- `metrics`: accuracy, F1, squared error and correlation, as `evaluate` metrics.
- `embedded_data`: datasets built from installed packages, without network.
- `data_sets`: files or a dataset, splits, columns.
- `completions`: tokenization of prompts and completions, and generation.
- `labels`: label columns, names and ids, and predictions.
- `fine_tuning`: loading the model, and running the trainer.
- `lora`: LoRA adapters.
"""

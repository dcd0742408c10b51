"""A dataset that adds random noise to its texts."""

import tiny
import torch


class NoisyTexts(torch.utils.data.Dataset):
    """Masks random tokens at every read, like random augmentation."""

    def __init__(self, rows, generator=None):
        self.rows, self.generator = rows, generator

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        mask = torch.rand(tiny.LENGTH, generator=self.generator) < 0.9
        return {**self.rows[i], "attention_mask": mask.long()}

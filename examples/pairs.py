"""What the other examples train on: a .csv of the columns image and caption, paths from the file's folder."""

import csv
from pathlib import Path

import torch


class Pairs(torch.utils.data.Dataset):
    """Images and captions as a transformers processor prepares them."""

    def __init__(self, path, processor):
        self.folder, self.processor = Path(path).parent, processor
        with open(path, newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        from PIL import Image

        with Image.open(self.folder / self.rows[i]["image"]) as image:
            picture = image.convert("RGB")
        text = {"padding": "max_length", "truncation": True, "max_length": self.processor.tokenizer.model_max_length}
        found = self.processor(images=picture, text=self.rows[i]["caption"], return_tensors="pt", **text)
        return {name: value[0] for name, value in found.items()}

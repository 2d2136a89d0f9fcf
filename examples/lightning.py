"""PyTorch Lightning; on several devices its DistributedDataParallel and gapkern's loss of the whole batch.

python examples/lightning.py openai/clip-vit-base-patch32 pairs.csv
"""

import sys

import pytorch_lightning
import torch
from pairs import Pairs
from transformers import AutoModel, AutoProcessor

from gapkern import ClipLoss
from gapkern.models.transformers import features


class Contrastive(pytorch_lightning.LightningModule):
    def __init__(self, model, lr=1e-5):
        super().__init__()
        self.model, self.lr, self.loss = model, lr, None

    def setup(self, stage):
        # gather_with_grad: the gradients that DDP averages are then those of the whole batch in one process.
        self.loss = ClipLoss(gather_with_grad=True, rank=self.global_rank, world_size=self.trainer.world_size)

    def training_step(self, batch, _):
        pixels = batch.pop("pixel_values")
        images = torch.nn.functional.normalize(features(self.model.get_image_features(pixel_values=pixels)), dim=1)
        texts = torch.nn.functional.normalize(features(self.model.get_text_features(**batch)), dim=1)
        value = self.loss(images, texts, self.model.logit_scale.exp())
        self.log("loss", value)
        return value

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(name, pairs, batch_size=256, epochs=1, **options):
    model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    loader = torch.utils.data.DataLoader(Pairs(pairs, processor), batch_size, shuffle=True, drop_last=True)
    trainer = pytorch_lightning.Trainer(max_epochs=epochs, **options)
    trainer.fit(Contrastive(model), loader)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])

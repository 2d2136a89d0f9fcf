"""A CLIP or SigLIP of transformers with its own Trainer: its forward then returns gapkern's loss, without the logits.

python examples/transformers_trainer.py openai/clip-vit-base-patch32 pairs.csv out
"""

import sys

from pairs import Pairs
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from gapkern.losses import patch_transformers


class WithLoss(Trainer):
    """Asks the model for its loss, which it does not return unless asked."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(**inputs, return_loss=True)
        return (output.loss, {}) if return_outputs else output.loss


def main(name, pairs, out, batch_size=256, epochs=1, **options):
    model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    settings = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        remove_unused_columns=False,  # the dataset returns what the model takes
        dataloader_drop_last=True,
        report_to="none",
        **options,
    )
    with patch_transformers(model):  # across ranks: patch_transformers(model, group=True), the loss of the whole batch
        trainer = WithLoss(model, settings, train_dataset=Pairs(pairs, processor))
        trainer.train()
    model.save_pretrained(out)
    processor.save_pretrained(out)  # gapkern embed --model hf:out
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])

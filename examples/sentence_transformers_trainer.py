"""A model of sentence-transformers with its own trainer and gapkern's MultipleNegativesRankingLoss.

python examples/sentence_transformers_trainer.py all-MiniLM-L6-v2 pairs.csv out
The columns of the .csv are anchor, positive and any number of negatives.
"""

import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from gapkern.losses.sentence_transformers import MultipleNegativesRankingLoss


def main(name, pairs, out, batch_size=256, epochs=1, **options):
    model = SentenceTransformer(name, device=options.pop("device", None))
    rows = pairs if isinstance(pairs, Dataset) else Dataset.from_csv(pairs)
    settings = SentenceTransformerTrainingArguments(
        output_dir=out,
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        report_to="none",
        **options,
    )
    loss = MultipleNegativesRankingLoss(model)  # was: sentence_transformers.losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, settings, train_dataset=rows, loss=loss)
    trainer.train()
    model.save(out)  # gapkern embed --model st:out
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])

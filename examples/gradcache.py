"""A plain loop whose batch the encoders cannot hold: GradCache, the gradients of the whole batch from chunks of it.

python examples/gradcache.py openai/clip-vit-base-patch32 pairs.csv
"""

import sys

import torch
from pairs import Pairs
from transformers import AutoModel, AutoProcessor

from gapkern import cached, contrastive_loss
from gapkern.models.transformers import features


def main(name, pairs, batch_size=4096, chunk=64, epochs=1, lr=1e-5, device="cpu"):
    model, processor = AutoModel.from_pretrained(name).to(device), AutoProcessor.from_pretrained(name)
    loader = torch.utils.data.DataLoader(Pairs(pairs, processor), batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def images(pixels):
        return torch.nn.functional.normalize(features(model.get_image_features(pixel_values=pixels)), dim=1)

    def texts(tokens):
        return torch.nn.functional.normalize(features(model.get_text_features(**tokens)), dim=1)

    loss = cached(contrastive_loss, [images, texts], chunk=chunk)
    values = []
    for _ in range(epochs):
        for batch in loader:
            batch = {key: value.to(device) for key, value in batch.items()}
            pixels = batch.pop("pixel_values")
            value = loss([pixels, batch], model.logit_scale.exp())  # encoded without a graph, chunk by chunk
            optimizer.zero_grad()
            value.backward()  # each chunk is encoded again, with the gradients of its embeddings
            optimizer.step()
            values.append(value.item())
            print(f"loss {values[-1]:.4f}")
    return model, values


if __name__ == "__main__":
    main(*sys.argv[1:])

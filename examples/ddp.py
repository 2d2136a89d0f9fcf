"""Several processes with DistributedDataParallel; each keeps its share of the batch, the loss is that of all of it.

torchrun --nproc_per_node=8 examples/ddp.py openai/clip-vit-base-patch32 pairs.csv
"""

import os
import sys

import torch
from pairs import Pairs
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoProcessor

from gapkern.losses import patch_transformers


def main(name, pairs, batch_size=256, epochs=1, lr=1e-5, out=None):
    cuda = torch.cuda.is_available()
    distributed.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model, processor = AutoModel.from_pretrained(name).to(device), AutoProcessor.from_pretrained(name)
    patch_transformers(model, group=True)  # texts are gathered, gradients go back to their owners
    trained = DistributedDataParallel(model)
    data = Pairs(pairs, processor)
    sampler = torch.utils.data.DistributedSampler(data, world, rank, drop_last=True)
    loader = torch.utils.data.DataLoader(data, batch_size, sampler=sampler, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            value = trained(**{key: x.to(device) for key, x in batch.items()}, return_loss=True).loss
            optimizer.zero_grad()
            (world * value).backward()  # DDP takes the mean over ranks of what is to be summed
            optimizer.step()
            if rank == 0:
                print(f"loss {value.item():.4f}")
    if rank == 0 and out:
        model.save_pretrained(out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The oracles: every operator in plain PyTorch, as its definition reads. They import nothing of gapkern."""

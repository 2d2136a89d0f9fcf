"""Plain PyTorch oracles, one file per capability; nothing here shares code with the kernels."""

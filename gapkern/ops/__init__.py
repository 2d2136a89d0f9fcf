"""Operators: argument order, fake kernels, autograd and autocast rules, one file per capability."""

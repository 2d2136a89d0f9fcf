"""A CUDA device made of software: the library's own CUDA objects, executed from their PTX with every access checked."""

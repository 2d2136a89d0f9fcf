"""The cases of bench/bench_gpu.py."""

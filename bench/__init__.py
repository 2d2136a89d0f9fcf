"""Measurements. Nothing is imported here: what limits instruction sets and threads is read as libraries are loaded."""

# A processor without AVX-512, for everybody: our kernels, ATen's, MKL's, oneDNN's; Inductor's by `simdlen`.
LIMITS = {
    "avx2": {
        "GAPKERN_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

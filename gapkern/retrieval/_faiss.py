"""FAISS, imported when it is first needed, and its errors in our words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gapkern import _check


def faiss() -> Any:
    """The faiss module.

    Raises:
        ImportError: it is not installed.
    """
    return _check.extra("faiss", "faiss-cpu", "retrieval")


def no_gpu() -> str | None:
    """Why FAISS cannot search on a GPU here; None where it can."""
    module = faiss()
    if not hasattr(module, "StandardGpuResources"):
        return f"FAISS {module.__version__} is built without GPUs here (faiss-gpu has them)"
    return None if module.get_num_gpus() else "FAISS sees no GPU"


def on_gpu(index: Any) -> tuple[Any, Any]:
    """A copy of an index on FAISS's first GPU, and the resources that it needs as long as it lives."""
    module = faiss()
    resources = module.StandardGpuResources()
    return module.index_cpu_to_gpu(resources, 0, index), resources


@contextmanager
def errors(name: str, expected: str) -> Iterator[None]:
    """Turns what FAISS throws into a ValueError `name: expected ..., got ...` with FAISS's own reason."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # "Error in <signature> at <file>:<line>: Error: 'condition' failed: reason"
        reason = re.sub(r"^Error in .*? at \S+?:\d+: (Error: )?", "", str(error).strip().replace("\n", " "))
        raise ValueError(f"{name}: expected {expected}; FAISS: {reason}") from None


def clusterings(index: Any) -> Iterator[tuple[Any, int]]:
    """The parameters of each k-means that an index learns by, and its number of centroids."""
    module = faiss()
    index = module.downcast_index(index)
    for name in ("index", "base_index", "storage", "quantizer"):
        inner = getattr(index, name, None)
        if inner is not None:
            yield from clusterings(inner)
    # A char; by 1 the quantizer learns the lists itself.
    if hasattr(index, "nlist") and index.quantizer_trains_alone != "\x01":
        yield index.cp, index.nlist
    for name in ("pq", "refine_pq", "rq", "prq"):
        if hasattr(index, name):
            yield from _codebooks(getattr(index, name))


def _codebooks(quantizer: Any) -> Iterator[tuple[Any, int]]:
    module = faiss()
    if isinstance(quantizer, module.ProductAdditiveQuantizer):
        for i in range(quantizer.nsplits):
            yield from _codebooks(module.downcast_AdditiveQuantizer(quantizer.subquantizer(i)))
    elif isinstance(quantizer, module.ProductQuantizer):
        yield quantizer.cp, quantizer.ksub
    elif isinstance(quantizer, module.ResidualQuantizer):
        yield quantizer.cp, 2 ** int(module.vector_to_array(quantizer.nbits).max())


def rotations(index: Any) -> list[Any]:
    """The OPQ matrices of an index."""
    module = faiss()
    index = module.downcast_index(index)
    if isinstance(index, module.IndexPreTransform):
        chain = [module.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        return [transform for transform in chain if isinstance(transform, module.OPQMatrix)]
    return rotations(index.index) if isinstance(index, module.IndexIDMap) else []


def train(index: Any, sample: np.ndarray, name: str) -> None:
    """Trains an index on rows (N, D) that `name` stands for, and warns once where they are few for its centroids.

    FAISS prints its own warning on stderr for every clustering, of which OPQ does hundreds; it is not asked to.
    """
    opq = rotations(index)
    learners = [faiss().ProductQuantizer(r.d_out, r.M, 8) for r in opq]
    for rotation, learner in zip(opq, learners, strict=True):
        rotation.pq = learner
    found = [*clusterings(index), *((learner.cp, learner.ksub) for learner in learners)]
    wanted, centroids = max(((p.min_points_per_centroid * k, k) for p, k in found), default=(0, 0))
    advised = [parameters.min_points_per_centroid for parameters, _ in found]
    try:
        for parameters, _ in found:
            parameters.min_points_per_centroid = 1
        index.train(sample)
    finally:
        for (parameters, _), before in zip(found, advised, strict=True):
            parameters.min_points_per_centroid = before
        for rotation in opq:
            rotation.pq = None
    if len(sample) < wanted:
        _check.warn(
            f"{name}: FAISS: clustering {len(sample)} points to {centroids} centroids: please provide at least "
            f"{wanted} training points"
        )

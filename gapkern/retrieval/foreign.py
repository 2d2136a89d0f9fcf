"""Indexes of any origin: ours, FAISS's files alone, the folders of autofaiss and clip-retrieval; and what was indexed.

autofaiss writes `knn.index` and `index_infos.json` from a folder of `.npy` files, clip-retrieval `image.index` and
`text.index` from `img_emb` and `text_emb`. Embeddings that lie beside an index are taken where they are of its size,
and where its codes say that they are what was indexed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, files, layout
from gapkern.retrieval import families, intake, store, stored
from gapkern.retrieval._faiss import errors, faiss

ENDINGS = (".index", ".faiss", ".bin", ".ivf")
KINDS = {"image": ("img_emb",), "text": ("text_emb",)}  # by the name of clip-retrieval's index
BESIDE = "embeddings"  # the folder that both tools' manuals index
CHUNK = 2**14  # rows that are looked at at once
SAMPLE = 256  # rows whose codes are compared with embeddings
OWN = 0.75  # of them must decode nearer to their own embedding than to another's; of rows in another order half do


def located(existing: str | os.PathLike[str], name: str = "existing") -> Path:
    """FAISS's file: the path itself, or the only one in that folder.

    Raises:
        ValueError: there is none, or several.
    """
    path = Path(existing)
    if path.is_dir():
        inside = holds(path)
        if len(inside) != 1:
            names = ", ".join(p.name for p in inside) or "none"
            raise ValueError(f"{name}: expected one of {' '.join(ENDINGS)} in the folder {path}, got {names}; name it")
        path = inside[0]
    if not path.is_file():
        raise ValueError(f"{name}: expected FAISS's file of an index or a folder with one, got {path}: there is none")
    return path


def holds(folder: Path) -> list[Path]:
    """The files in it that are named as FAISS's are."""
    return sorted((p for p in folder.iterdir() if p.suffix in ENDINGS), key=lambda p: layout.natural(p.name))


def is_ours(existing: str | os.PathLike[str]) -> bool:
    """Whether the folder is one of `GapIndex.save`."""
    return (Path(existing) / store.MANIFEST).exists()


def opened(existing: str | os.PathLike[str], name: str = "existing", mmap: bool = False) -> tuple[Path, Any]:
    """The path of an index, and FAISS's index of vectors from it.

    Raises:
        ValueError: no index, an empty one, or one of ours that has a shift already.
    """
    path = Path(existing)
    if is_ours(path):
        found = store.manifest(path)
        paths = store.checked(path, found, None)
        if "shift" in paths:
            raise ValueError(f"{name}: expected an index without a shift or a projection, got {path}, which has one")
        return path, stored.read(paths["index"], paths.get("lists"), mmap)
    path = located(path, name)
    with errors(name, f"FAISS's file of an index, got {path}"):
        try:
            index = stored.read(path, None, mmap)
        except ValueError as error:
            raise ValueError(str(error).replace("path: ", f"{name}: ", 1)) from None
    if not index.ntotal:
        raise ValueError(f"{name}: expected an index with vectors, got none in {path}")
    return path, index


def metric(index: Any, path: Path, name: str = "existing") -> str:
    """ "l2" or "ip".

    Raises:
        ValueError: another metric.
    """
    found = {faiss().METRIC_L2: "l2", faiss().METRIC_INNER_PRODUCT: "ip"}.get(index.metric_type)
    if found is None:
        raise ValueError(f"{name}: expected an index by L2 or inner product, got {kind(index)} in {path}")
    return found


def innermost(index: Any) -> Any:
    """The index in id maps."""
    module = faiss()
    index = module.downcast_index(index)
    return innermost(index.index) if isinstance(index, module.IndexIDMap) else index


def kind(index: Any) -> str:
    """FAISS's type of the index in id maps."""
    return type(innermost(index)).__name__


def ids(index: Any) -> np.ndarray:
    """The ids (G,) of the rows, in the order in which `decoded` gives them."""
    module = faiss()
    outer = module.downcast_index(index)
    if families.lists_of(index) is not None:
        return stored.ids(index)
    if isinstance(outer, module.IndexIDMap):
        return module.vector_to_array(outer.id_map)
    return np.arange(index.ntotal)


def named(index: Any, path: Path, name: str = "existing") -> Any:
    """The index as `GapIndex` has them: inverted lists with their ids, or an id map around everything else.

    Raises:
        ValueError: an id map within another index.
    """
    module = faiss()
    outer = module.downcast_index(index)
    inner = innermost(outer)
    if any(isinstance(part, module.IndexIDMap) for part in families.parts(inner, quantizers=False)):
        raise ValueError(
            f"{name}: expected ids of the whole index, got an id map within {type(inner).__name__}: {path}"
        )
    if type(inner) in (module.IndexFlat, module.IndexFlatL2, module.IndexFlatIP):
        held = module.rev_swig_ptr(inner.get_xb(), inner.ntotal * inner.d).reshape(inner.ntotal, inner.d)
        for first in range(0, len(held), CHUNK):
            intake.moved(f"{name}: {path}", torch.from_numpy(held[first : first + CHUNK]), first, None, side="gallery")
    if families.lists_of(index) is not None or isinstance(outer, module.IndexIDMap):
        return index
    wrapped = module.IndexIDMap(module.IndexFlat(outer.d, outer.metric_type))
    wrapped.index, wrapped.referenced_objects = index, [index]  # FAISS refuses one that has vectors already
    wrapped.ntotal, wrapped.is_trained = outer.ntotal, outer.is_trained
    module.copy_array_to_vector(np.arange(outer.ntotal), wrapped.id_map)
    return wrapped


def rows(index: Any, embeddings: Any, path: Path) -> tuple[Tensor, Tensor, str]:
    """Rows (G, D), their ids (G,), and where the rows are from: "embeddings", "index" or "codes".

    Args:
        embeddings: (G, D) in the order of the ids, or a file or folder of them; None looks for them beside `path`, then
            in the index.

    Raises:
        ValueError: embeddings of another shape or of other rows; none, and an index that FAISS does not decode.
    """
    names = ids(index)
    if embeddings is not None:
        share = 0.0
        for rows in _read(embeddings) if isinstance(embeddings, str | os.PathLike) else (embeddings,):
            given = _check.finite("embeddings", _check.matrix("embeddings", rows, rows="G")).detach().cpu()
            if given.shape != (index.ntotal, index.d):
                raise ValueError(
                    f"embeddings: expected shape ({index.ntotal}, {index.d}) as {path} holds, got {tuple(given.shape)}"
                )
            share = max(share, owned(index, given, names))
            if share >= OWN:
                return given, torch.from_numpy(np.sort(names)), "embeddings"
        raise ValueError(
            f"embeddings: expected the rows that are in {path}, in the order of their ids, got others: "
            f"{share:.0%} of some codes are nearer to their own row than to another"
        )
    holds = _holds_rows(index)
    if not holds and (found := beside(index, path, names)) is not None:
        return found, torch.from_numpy(np.sort(names)), "embeddings"
    expected = f"an index whose codes FAISS decodes, got {kind(index)} in {path}; give its embeddings"
    if not families.decodes(index):
        raise ValueError(f"existing: expected {expected}")
    with errors("existing", expected):
        whole = _check.finite("existing", torch.from_numpy(decoded(index, names)))
    return whole, torch.from_numpy(names), "index" if holds else "codes"


def decoded(index: Any, names: np.ndarray) -> np.ndarray:
    """What the codes stand for (G, D), in the order of `names`, which are those of `ids`."""
    if families.lists_of(index) is not None:
        return stored.vectors(index, names, kind(index))
    found: np.ndarray = innermost(index).reconstruct_n(0, index.ntotal)
    return found


def beside(index: Any, path: Path, names: np.ndarray) -> Tensor | None:
    """The only embeddings near an index's file that are what it holds; None where there are none.

    Raises:
        ValueError: several.
    """
    found = []
    for folder in _folders(path):
        try:
            if files.size(folder) != (index.ntotal, index.d):
                continue
            files.shards(folder)
        except ValueError:
            continue
        for matrix in _read(folder):
            if bool(matrix.isfinite().all()) and owned(index, matrix, names) >= OWN:
                found.append((folder, matrix))
                break
    if len(found) > 1:
        said = " and ".join(str(folder) for folder, _ in found)
        raise ValueError(f"embeddings: expected one set beside {path}, got {said}: name one")
    if not found:
        return None
    layout.note(f"embeddings: {found[0][0]}")
    return found[0][1]


def _read(place: str | os.PathLike[str]) -> Iterator[Tensor]:
    """The rows of a file or folder; of a folder's shards also in autofaiss's order, names as texts, 10 before 2."""
    yield files.load_embeddings(place, name="embeddings")
    if Path(place).is_dir() and sorted(parts := files.shards(Path(place))) != parts:
        yield torch.cat([files.load_embeddings(part) for part in sorted(parts)])


def _folders(path: Path) -> Iterator[Path]:
    """Where the embeddings of an index's file may lie: in its folder, or beside that."""
    home = path.parent if path.is_file() else path
    places = (os.path.normpath(base) for base in (home, home / BESIDE, home / "..", home / ".." / BESIDE))
    for base in map(Path, dict.fromkeys(places)):
        for name in KINDS.get(path.stem, ("img_emb", "text_emb")):
            if (base / name).is_dir():
                yield base / name
        if base.name == BESIDE and base.is_dir() and path.stem not in KINDS:
            yield base


def owned(index: Any, embeddings: Tensor, names: np.ndarray) -> float:
    """Share of some rows whose codes decode no farther from their own embedding than from another row's; 1 where FAISS
    does not decode.

    Embeddings (G, D) are in the order of the ids.
    """
    if len(names) < 2 or not families.decodes(index):
        return 1.0
    order = names.argsort(kind="stable")
    ranks = np.unique(np.linspace(0, len(names) - 1, min(SAMPLE, len(names))).astype(np.int64))
    try:
        with errors("existing", "codes that FAISS decodes"):
            if families.lists_of(index) is not None:
                some = stored.vectors(index, names[order[ranks]], kind(index))
            else:
                inner = innermost(index)
                some = np.stack([inner.reconstruct(int(row)) for row in order[ranks]])
    except ValueError:
        return 1.0
    if not np.isfinite(some).all():
        return 1.0
    own = embeddings[torch.from_numpy(ranks)].double()
    other = own.roll(len(own) // 2, 0)
    found = torch.from_numpy(some).double()
    if index.metric_type != faiss().METRIC_L2:  # rows may have been scaled before they were indexed
        own, other, found = (torch.nn.functional.normalize(x, dim=1) for x in (own, other, found))
    near, far = ((found - x).square().sum(1) for x in (own, other))
    return float((near <= far).double().mean())


def _holds_rows(index: Any) -> bool:
    """Whether the rows are there as they were given: no codes and no transforms."""
    module = faiss()
    flat = (module.IndexFlat, module.IndexIVFFlat, module.IndexHNSWFlat, module.IndexNSGFlat, module.IndexIDMap)
    return all(isinstance(part, flat) for part in families.parts(index, quantizers=False))

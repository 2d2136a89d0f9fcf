"""`embed`: a model's embeddings of images and texts, shard by shard, over any number of ranks; goes on after a kill.

Each shard is batched by itself and belongs to rank (shard mod ranks), so that neither ranks nor interruptions change
what a row is encoded with. A shard's hash and the fingerprint of its rows are noted in `.progress` before the shard
takes its name: a shard that is there, has the noted hash and is of the rows that are there now is finished, all else is
done again. The manifest is written last, from the notes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gapkern import _check, files, layout, models, prompts
from gapkern.embeddings import manifests, sides, sources
from gapkern.embeddings.folder import Embeddings
from gapkern.embeddings.job import DTYPES, Job, Tick
from gapkern.ranks import RankLost

ON_ERROR = ("stop", "skip")


def embed(
    model: str | models.Model,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    images: Any = None,
    texts: Any = None,
    out: str | os.PathLike[str],
    batch_size: int = 64,
    resume: bool = True,
    classnames: Sequence[str] | Mapping[str, str] | None = None,
    templates: prompts.Templates | tuple[str, ...] = prompts.DEFAULT,
    shard_rows: int = 16384,
    dtype: str = "float32",
    normalize: bool = True,
    metadata: bool = True,
    workers: int = 0,
    on_error: str = "stop",
    device: str = "auto",
    precision: str = "auto",
    timeout: float = 86400,
    on_progress: Tick = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Embeds images and texts with a model, into a folder as clip-retrieval writes it.

    Args:
        model, pretrained, device, precision: see `gapkern.models.load`; or a loaded model. Under torchrun each rank
            takes the CUDA device of its LOCAL_RANK.
        images: a folder, webdataset tars, or `sources.Images`.
        texts: a file of lines, captions in JSON (`gapkern.captions`), strings, or `sources.Texts`. Captions find their
            images by name among `images`, or those that `out` has.
        out: folder. Written: img_emb, text_emb with their manifests, metadata, text_metadata; labels.npy and
            classnames.json of labelled images; image_of.npy of captions; classes.npy; rows.json, which says whose
            rows these are.
        batch_size: rows that are encoded at a time.
        resume: keep the finished shards of an earlier run with the same arguments whose rows have not changed; False
            replaces what is there.
        classnames, templates: also write classes.npy, class vectors (C, D) from templates with {c}. Labelled images'
            classes are matched by name, in any order; a mapping says what each is called.
        shard_rows: rows of a shard: what is done again at most after a kill, per rank.
        dtype: "float32" or "float16".
        normalize: L2-normalise in float32 before the dtype; False stores embeddings as they come.
        metadata: write Parquet files of keys, captions and labels; needs pyarrow.
        workers: processes that read images; 0 reads them here.
        on_error: "stop" at an image that cannot be read; "skip" leaves it and its captions out, and names it in the
            manifest.
        timeout: seconds that a rank waits for the others at the end.
        on_progress: called with a stage, rows done and rows in all, of this rank.

    Returns:
        The manifests by kind (that of text_emb says under "context" how many tokens the model reads, and under
        "truncated" how many texts are longer); under "computed" the rows that this run computed, on all ranks; under
        "skipped" the images that were left out and why; the model and device.

    Raises:
        ValueError: an argument, an image that cannot be read (by name), captions or class names of other images or
            classes, a folder of another run (with what differs), embeddings that are not finite (with their row).
        ImportError: the model's library or pyarrow is not installed.
        RankLost: another rank is gone.
    """
    from gapkern.ranks import Ranks

    batch_size = _check.integer("batch_size", batch_size, low=1)
    shard_rows = _check.integer("shard_rows", shard_rows, low=1)
    workers = _check.integer("workers", workers, low=0)
    _check.choice("dtype", dtype, DTYPES)
    _check.choice("on_error", on_error, ON_ERROR)
    if images is None and texts is None and classnames is None:
        raise ValueError("images and texts: expected one or both, got neither")
    if metadata:
        try:
            _check.extra("pyarrow.parquet", "pyarrow", "tables")
        except ImportError as error:
            raise ImportError(f"{error}, or pass metadata=False (--no_metadata)") from None
    skip = on_error == "skip"
    out = Path(out)
    pictures = sources.images(images) if images is not None else None
    told = sources.texts(texts) if texts is not None else None
    names = _names(out, pictures, classnames)
    if pictures is not None and names is not None:
        pictures, names = pictures.named(classnames if isinstance(classnames, Mapping) else names)
    if told is not None and pictures is not None:
        told.joined(pictures.names, skip=skip)
    out = files.folder(out)
    with Ranks(timeout, "cpu") as ranks:
        if isinstance(model, str):
            if device == "auto" and torch.cuda.is_available():
                device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
            model = models.load(model, pretrained, device=device, precision=precision)
        for modality, given in (("image", pictures), ("text", told), ("text", names)):
            if given is not None:
                model.check(modality, "classnames" if given is names else f"{modality}s")
        result: dict[str, Any] = {"model": model.id, "device": str(model.device), "computed": {}}
        facts = {
            "model": model.id,
            "normalized": bool(normalize),
            "stored": dtype,
            "batch_size": batch_size,
            "shard_rows": shard_rows,
            "has_metadata": bool(metadata),
            "precision": model.precision,
        }
        settled = sides.Settled(model.id, pictures is not None, told is not None, resume)
        kept: list[int] = []

        def run(kind: str, source: Any) -> Job:
            job = Job(kind, source, model, out / kind, facts, ranks, workers, on_progress, skip=skip)
            result[kind], result["computed"][kind] = job.run(resume)
            return job

        if pictures is not None:
            job = run("img_emb", pictures)
            kept = job.kept
            result["skipped"] = job.skipped
            settled.classes = pictures.classes
            if pictures.labels is not None:
                settled.labels = [pictures.labels[i] for i in kept]
        if told is not None:
            if pictures is not None:
                told = told.joined([pictures.names[i] for i in kept], skip=skip)
            else:
                told = _with_stored(out, told)
            run("text_emb", told)
            settled.image_of, settled.captioned = told.image_of, told.images
        if ranks.rank == 0:
            if names is not None:
                vectors = model.classifier(names, templates, batch_size).cpu()
                settled.classnames, settled.vectors = names, _check.finite("classes", vectors)
                result["classes"] = list(vectors.shape)
            sides.settle(out, settled)
        return result


def _names(out: Path, images: sources.Images | None, classnames: Any) -> list[str] | None:
    """The class names as a list; refused where they contradict the labels that `out` has and keeps."""
    if classnames is None:
        return None
    names = list(classnames.values()) if isinstance(classnames, Mapping) else list(classnames)
    if images is None:
        sides.relabelled(out, names)
    return names


def _with_stored(out: Path, texts: sources.Texts) -> sources.Texts:
    """Captions of images that an earlier run embedded into `out`, where all are among them."""
    if texts.images is None or manifests.manifest(out / "img_emb") is None:
        return texts
    names = Embeddings(out, "img_emb").keys()
    if names is None:
        return texts
    try:
        return texts.joined(names)
    except ValueError as error:
        layout.note(f"{error}: image_of.npy is of the captions' own images")
        return texts


__all__ = ["ON_ERROR", "RankLost", "embed"]

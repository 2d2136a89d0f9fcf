"""`embed`: a model's embeddings of images and texts, shard by shard, over any number of ranks; goes on after a kill.

Each shard is batched by itself and belongs to rank (shard mod ranks), so that neither ranks nor interruptions change
what a row is encoded with. A shard's hash is noted in `.progress` before the shard takes its name: a shard that is
there and has the noted hash is finished, all else is done again. The manifest is written last, from the notes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, files, models
from gapkern.embeddings import folder as folders
from gapkern.embeddings import sources

PROGRESS = ".progress"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
Tick = Callable[[str, int, int], None]


class RankLost(RuntimeError):
    """Another rank has ended or no longer answers; what is finished is kept."""


def embed(
    model: str | models.Model, pretrained: str | os.PathLike | None = None, *, images: Any = None, texts: Any = None,
    out: str | os.PathLike, batch_size: int = 64, resume: bool = True, classnames: Sequence[str] | None = None,
    templates: Sequence[str] = ("a photo of a {c}.",), shard_rows: int = 16384, dtype: str = "float32",
    normalize: bool = True, metadata: bool = True, workers: int = 0, device: str = "auto", precision: str = "auto",
    timeout: float = 86400, on_progress: Tick = lambda stage, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Embeds images and texts with a model of open_clip, into a folder as clip-retrieval writes it.

    Args:
        model, pretrained, device, precision: see `gapkern.models.load`; or a loaded model. Under torchrun each rank
            takes the CUDA device of its LOCAL_RANK.
        images: a folder, webdataset tars, or `sources.Images`.
        texts: a file of lines, COCO's captions JSON, strings, or `sources.Texts`.
        out: folder. Written: img_emb, text_emb with their manifests, metadata, text_metadata; labels.npy and
            classnames.json of labelled images; image_of.npy of captions; classes.npy.
        batch_size: rows that are encoded at a time.
        resume: keep the finished shards of an earlier run with the same arguments; False replaces what is there.
        classnames, templates: also write classes.npy, class vectors (C, D) from templates with {c}.
        shard_rows: rows of a shard: what is done again at most after a kill, per rank.
        dtype: "float32" or "float16".
        normalize: L2-normalise in float32 before the dtype; False stores embeddings as they come.
        metadata: write Parquet files of names, captions and labels; needs pyarrow.
        workers: processes that read images; 0 reads them here.
        timeout: seconds that a rank waits for the others at the end.
        on_progress: called with a stage, rows done and rows in all, of this rank.

    Returns:
        The manifests by kind; under "computed" the rows that this run computed, on all ranks; the model and device.

    Raises:
        ValueError: an argument, an image that cannot be read (by name), a folder of another run (with what differs),
            embeddings that are not finite (with their row).
        ImportError: open_clip or pyarrow is not installed.
        RankLost: another rank is gone.
    """
    from gapkern.ranks import Ranks

    batch_size = _check.integer("batch_size", batch_size, low=1)
    shard_rows = _check.integer("shard_rows", shard_rows, low=1)
    workers = _check.integer("workers", workers, low=0)
    _check.choice("dtype", dtype, DTYPES)
    if images is None and texts is None and classnames is None:
        raise ValueError("images and texts: expected one or both, got neither")
    if metadata:
        try:
            _check.extra("pyarrow.parquet", "pyarrow", "tables")
        except ImportError as error:
            raise ImportError(f"{error}, or pass metadata=False (--no_metadata)") from None
    wanted: dict[str, Any] = {}
    if images is not None:
        wanted["img_emb"] = sources.images(images)
    if texts is not None:
        wanted["text_emb"] = sources.texts(texts)
    out = files.folder(out)
    with Ranks(timeout, "cpu") as ranks:
        if isinstance(model, str):
            if device == "auto" and torch.cuda.is_available():
                device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
            model = models.load(model, pretrained, device=device, precision=precision)
        result: dict[str, Any] = {"model": model.id, "device": str(model.device), "computed": {}}
        for kind, source in wanted.items():
            facts = {
                "model": model.id, "source": source.fingerprint, "normalized": bool(normalize), "stored": dtype,
                "total": len(source), "batch_size": batch_size, "shard_rows": shard_rows,
                "has_metadata": bool(metadata),
                "precision": model.precision,
            }  # fmt: skip
            job = _Job(kind, source, model, out / kind, facts, ranks, workers, on_progress)
            result[kind], result["computed"][kind] = job.run(resume)
        if ranks.rank == 0:
            _sides(out, wanted)
            if classnames is not None:
                vectors = model.classifier(classnames, templates, batch_size).cpu()
                files.save_embeddings(out / "classes.npy", _check.finite("classes", vectors))
                files.write_json(out / "classnames.json", list(classnames))
                result["classes"] = list(vectors.shape)
        return result


class _Job:
    """One kind's shards: which are finished, how the others are made, and the manifest of all."""

    def __init__(self, kind, source, model, folder: Path, facts, ranks, workers: int, tick: Tick):
        self.kind, self.source, self.model, self.folder, self.facts = kind, source, model, folder, facts
        self.ranks, self.workers, self.tick = ranks, workers, tick
        self.notes = folder / PROGRESS
        self.beside = folder.parent / folders.METADATA[kind][0]
        self.count = -(-len(source) // facts["shard_rows"])

    def run(self, resume: bool) -> tuple[dict[str, Any], int]:
        self._with_others(self.ranks.agree, "arguments", self.facts)
        lock = None
        problem = None
        if self.ranks.rank == 0:
            try:
                lock = self._prepare(resume)
            except ValueError as error:
                problem = str(error)
        try:
            if problem := self._with_others(self.ranks.first, problem):
                raise ValueError(problem)
            mine = range(self.ranks.rank, self.count, self.ranks.world)
            pending = [i for i in mine if not self._finished(i)]
            computed = self._compute(pending, sum(len(self._rows(i)) for i in mine))
            computed = int(self._with_others(self.ranks.sum, torch.tensor([computed])))
            if self.ranks.rank == 0:
                self._finish()
            self._with_others(self.ranks.agree, "out", "written")
        finally:
            if lock is not None:
                lock.close()
        found = folders.manifest(self.folder)
        assert found is not None
        return found, computed

    def _with_others(self, exchange: Callable[..., Any], *values: Any) -> Any:
        try:
            return exchange(*values)
        except RuntimeError as error:
            raise RankLost(f"rank {self.ranks.rank}: lost another rank ({str(error).splitlines()[0]})") from None

    def _rows(self, shard: int) -> range:
        size = self.facts["shard_rows"]
        return range(shard * size, min(len(self.source), (shard + 1) * size))

    def _name(self, shard: int) -> str:
        return f"{self.kind}_{shard}.npy"

    def _prepare(self, resume: bool) -> Any:
        """Makes the folder ready, alone: refuses another run's, removes what a killed run left half done."""
        files.folder(self.folder)
        if self.facts["has_metadata"]:
            files.folder(self.beside)
        self.notes.mkdir(exist_ok=True)
        lock = open(self.notes / "lock", "w")  # noqa: SIM115
        try:
            # Of this process alone: workers that outlive it by seconds do not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(f"out: expected a folder that no other run writes, got {self.folder}") from None
        plan = self.notes / "plan.json"
        if not resume:
            self._clear()
        known = folders.manifest(self.folder, name="out")
        if known is None and plan.exists():
            known = json.loads(plan.read_text())
        if known is None and (there := [p.name for p in self.folder.iterdir() if p.suffix in (".npy", ".safetensors")]):
            raise ValueError(
                f"out: expected a folder of this command or an empty one, got {self.folder} with {there[0]}"
            )
        if known is not None:
            differing = [f"{key} {known.get(key)} there, {value} now" for key, value in self.facts.items()
                         if known.get(key) != value]  # fmt: skip
            if differing:
                lock.close()
                if not plan.exists():
                    shutil.rmtree(self.notes, ignore_errors=True)
                raise ValueError(
                    f"out: expected the arguments of the run that began {self.folder}, got others: "
                    f"{'; '.join(differing)} (resume=False or --no_resume begins anew)"
                )
        files.write_json(plan, self.facts)
        for old in (*self.folder.glob(".*.tmp*"), *self.beside.glob(".*.tmp*"), *self.notes.glob(".*.tmp*")):
            old.unlink(missing_ok=True)
        return lock

    def _clear(self) -> None:
        for old in (self.folder / folders.MANIFEST, *self.folder.glob(f"{self.kind}_*.npy"),
                    *self.beside.glob("metadata_*.parquet"), *self.notes.glob("*.json")):  # fmt: skip
            old.unlink(missing_ok=True)

    def _note(self, shard: int) -> dict[str, Any] | None:
        note = self.notes / f"{shard}.json"
        if note.exists():
            return json.loads(note.read_text())
        known = folders.manifest(self.folder)
        if known is None or shard >= len(known["shards"]):
            return None
        return {"shard": known["shards"][shard], "metadata": known["metadata"] and known["metadata"][shard]}

    def _finished(self, shard: int) -> bool:
        note = self._note(shard)
        if note is None:
            return False
        checks = [(self.folder / self._name(shard), note["shard"]["sha256"])]
        if note["metadata"]:
            checks.append((self.folder.parent / note["metadata"]["name"], note["metadata"]["sha256"]))
        return all(path.exists() and files.digest(path) == expected for path, expected in checks)

    def _compute(self, pending: list[int], total: int) -> int:
        """Encodes and writes this rank's missing shards; returns their rows."""
        size = self.facts["batch_size"]
        spans = [list(rows[first : first + size]) for rows in map(self._rows, pending)
                 for first in range(0, len(rows), size)]  # fmt: skip
        done = total - sum(map(len, spans))
        self.tick(self.kind, done, total)
        encoded = self._encoded(spans)
        computed = 0
        for shard in pending:
            parts: list[Tensor] = []
            rows = self._rows(shard)
            for _ in range(0, len(rows), size):
                parts.append(next(encoded))
                done += len(parts[-1])
                self.tick(self.kind, done, total)
            x = torch.cat(parts).to(DTYPES[self.facts["stored"]])
            if not bool(torch.isfinite(x).all()):
                row = rows[int((~torch.isfinite(x)).any(1).nonzero()[0])]
                name = self.source.names[row] if self.kind == "img_emb" else repr(self.source.texts[row])
                raise ValueError(
                    f"{self.kind}: expected finite {x.dtype} embeddings, got NaN or infinity in row {row}, {name}"
                )
            told = self._write_metadata(shard, rows)
            note = self.notes / f"{shard}.json"
            before = partial(self._write_note, note, told)
            folders.write_shard(self.folder, self._name(shard), x, before)
            computed += len(x)
        return computed

    @staticmethod
    def _write_note(note: Path, told: dict[str, Any] | None, entry: dict[str, Any]) -> None:
        files.write_json(note, {"shard": entry, "metadata": told})

    def _encoded(self, spans: list[list[int]]) -> Iterator[Tensor]:
        normalize = self.facts["normalized"]
        if self.kind == "text_emb":
            for span in spans:
                yield self.model.encode_texts([self.source.texts[i] for i in span], normalize=normalize).cpu()
            return
        workers = min(self.workers, len(spans))
        loader = torch.utils.data.DataLoader(
            _Preprocessed(self.source, self.model.preprocess), batch_sampler=spans, num_workers=workers,
            collate_fn=_collate, multiprocessing_context="fork" if workers else None,
            pin_memory=self.model.device.type == "cuda",
        )  # fmt: skip
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield self.model.encode_images(batch, normalize=normalize).cpu()

    def _write_metadata(self, shard: int, rows: range) -> dict[str, Any] | None:
        if not self.facts["has_metadata"]:
            return None
        import pyarrow
        from pyarrow import parquet

        path = self.beside / f"metadata_{shard}.parquet"
        table = pyarrow.table({key: list(v) for key, v in self.source.columns(slice(rows.start, rows.stop)).items()})
        with files.replacing(path) as temporary:
            parquet.write_table(table, temporary)
            files.sync(temporary)
        return {"name": f"{self.beside.name}/{path.name}", "rows": len(rows), "sha256": files.digest(path)}

    def _finish(self) -> None:
        notes = [self._note(shard) for shard in range(self.count)]
        missing = [self._name(i) for i, note in enumerate(notes)
                   if note is None or not (self.folder / self._name(i)).exists()]  # fmt: skip
        if missing:
            raise ValueError(
                f"out: expected all shards to be there, got none of {', '.join(missing[:3])}: removed meanwhile"
            )
        entries = [note["shard"] for note in notes if note]
        told = [note["metadata"] for note in notes if note]
        first = files.load_embeddings(self.folder / self._name(0))
        facts = self.facts | {"metadata": told if self.facts["has_metadata"] else None}
        folders.write_manifest(self.folder, entries, first.shape[1], first.dtype, **facts)
        shutil.rmtree(self.notes, ignore_errors=True)


class _Preprocessed(torch.utils.data.Dataset):
    def __init__(self, source: sources.Images, preprocess: Callable[[Any], Tensor]):
        self.source, self.preprocess = source, preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return self.preprocess(self.source.read(i))
        except ValueError as error:
            return str(error)


def _collate(items: list[Tensor | str]) -> Tensor | str:
    """A batch; or, where an image could not be read, why, as a worker's own error would come with its traceback."""
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)  # type: ignore[arg-type]


def _sides(out: Path, wanted: dict[str, Any]) -> None:
    """What `gapkern eval` asks for beside the embeddings."""
    import numpy as np

    images, texts = wanted.get("img_emb"), wanted.get("text_emb")
    if images is not None and images.labels is not None:
        files.write(out / "labels.npy", lambda p: np.save(p, np.asarray(images.labels, dtype=np.int64)))
        if images.classes is not None:
            files.write_json(out / "classnames.json", list(images.classes))
    if texts is not None and texts.image_of is not None:
        files.write(out / "image_of.npy", lambda p: np.save(p, np.asarray(texts.image_of, dtype=np.int64)))

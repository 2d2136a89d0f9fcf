"""One kind's shards: which rows each has, which are finished, how the others are made, and the manifest of all."""

import fcntl
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _formats, files, models
from gapkern.embeddings import keys, loading, manifests, writing
from gapkern.embeddings.folder import METADATA
from gapkern.layout import MANIFEST, PROGRESS
from gapkern.ranks import RankLost

DTYPES = {"float16": torch.float16, "float32": torch.float32}
NOTHING: dict[str, Any] = {"shard": None, "metadata": None, "source": "", "told": "", "skipped": {}, "truncated": 0}
Tick = Callable[[str, int, int], None]


class Job:
    """The shards of a source's rows in a folder.

    Attributes:
        skipped: images that could not be read, by key, and why; known once it has run.
        kept: the other rows.
    """

    def __init__(
        self,
        kind: str,
        source: Any,
        model: models.Model,
        folder: Path,
        facts: dict[str, Any],
        ranks: Any,
        workers: int,
        tick: Tick,
        *,
        skip: bool,
    ):
        self.kind, self.source, self.model, self.folder, self.facts = kind, source, model, folder, facts
        self.ranks, self.workers, self.tick, self.skip = ranks, workers, tick, skip
        self.notes = folder / PROGRESS
        self.beside = folder.parent / METADATA[kind][0]
        self.keys = list(source.keys)
        self.spans: list[range] = []
        self.skipped: dict[str, str] = {}
        self.kept: list[int] = []

    def run(self, resume: bool) -> tuple[dict[str, Any], int]:
        facts = {**self.facts, "rows": len(self.source), "order": keys.order(self.keys)}
        self._with_others(self.ranks.agree, "arguments", facts)
        lock = None
        problem = None
        spans: list[tuple[int, int]] = []
        if self.ranks.rank == 0:
            try:
                lock, spans = self._prepare(resume)
            except ValueError as error:
                problem = str(error)
        try:
            problem, spans = self._with_others(self.ranks.first, (problem, spans))
            if problem:
                raise ValueError(problem)
            self.spans = [range(first, last) for first, last in spans]
            mine = range(self.ranks.rank, len(self.spans), self.ranks.world)
            pending = [i for i in mine if self.spans[i] and not self._finished(i)]
            computed = self._compute(pending, sum(len(self.spans[i]) for i in mine))
            computed = int(self._with_others(self.ranks.sum, torch.tensor([computed])))
            self._settle(self._with_others(self.ranks.first, self._skips()))
            if self.ranks.rank == 0:
                self._finish()
            self._with_others(self.ranks.agree, "out", "written")
        finally:
            if lock is not None:
                lock.close()
        found = manifests.manifest(self.folder)
        assert found is not None
        return found, computed

    def _with_others(self, exchange: Callable[..., Any], *values: Any) -> Any:
        try:
            return exchange(*values)
        except RuntimeError as error:
            raise RankLost(f"rank {self.ranks.rank}: lost another rank ({_formats.reason(error)})") from None

    def _name(self, shard: int) -> str:
        return f"{self.kind}_{shard}.npy"

    def _told(self, shard: int) -> str:
        return f"{self.beside.name}/metadata_{shard}.parquet"

    def _prepare(self, resume: bool) -> tuple[Any, list[tuple[int, int]]]:
        """Makes the folder ready, alone: refuses another run's, removes what a killed run left half done.

        Returns the lock, and the rows of each shard.
        """
        files.folder(self.folder)
        if self.facts["has_metadata"]:
            files.folder(self.beside)
        self.notes.mkdir(exist_ok=True)
        lock = open(self.notes / "lock", "w")  # noqa: SIM115
        try:
            return lock, self._take(lock, resume)
        except BaseException:
            lock.close()
            raise

    def _take(self, lock: Any, resume: bool) -> list[tuple[int, int]]:
        """Locks the open file; the rest of `_prepare`."""
        try:
            # Of this process alone: workers that outlive it by seconds do not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out: expected a folder that no other run writes, got {self.folder}") from None
        plan = self.notes / "plan.json"
        if not resume:
            self._clear()
        found = manifests.manifest(self.folder, name="out")
        known = self._plan(plan) if found is None and plan.exists() else found
        if known is None and (there := [p.name for p in self.folder.iterdir() if p.suffix in (".npy", ".safetensors")]):
            raise ValueError(
                f"out: expected a folder of this command or an empty one, got {self.folder} with {there[0]}"
            )
        if known is not None:
            try:
                self._same(known)
            except ValueError:
                if not plan.exists():
                    shutil.rmtree(self.notes, ignore_errors=True)
                raise
        if found is not None:
            self._take_up(found)
        spans = self._layout((known or {}).get("spans") or [])
        ends = [self._ends(range(first, last)) for first, last in spans]
        files.write_json(plan, {**self.facts, "spans": ends})
        for old in (*self.folder.glob(".*.tmp*"), *self.beside.glob(".*.tmp*"), *self.notes.glob(".*.tmp*")):
            old.unlink(missing_ok=True)
        return spans

    def _plan(self, path: Path) -> dict[str, Any]:
        """What a run that was killed had begun."""
        known = files.read_json(path, name="out")
        if not isinstance(known, dict) or not manifests.is_spans(known.get("spans") or []):
            raise ValueError(
                f"out: expected a plan as embed writes it in {path} (resume=False or --no_resume begins anew)"
            )
        return known

    def _same(self, known: dict[str, Any]) -> None:
        """Raises ValueError where a folder was begun with other arguments, or for other rows altogether."""
        differing = [
            f"{key} {known.get(key)} there, {value} now" for key, value in self.facts.items() if known.get(key) != value
        ]
        there = known.get("spans") or []
        if self.kind == "img_emb":
            common = {key for ends in there for key in ends} & set(self.keys)
        else:
            notes = [note for note in map(self._note, range(len(there))) if note] or known.get("sources") or []
            before = {note["source"] for note in notes}
            common = {self.source.fingerprint_of(range(a, b)) for a, b in self._layout(there)} & before
            common = common or ({""} if not before else set())
        if there and not common:
            differing.append(f"other {'images' if self.kind == 'img_emb' else 'texts'} there than now")
        if differing:
            raise ValueError(
                f"out: expected the arguments of the run that began {self.folder}, got others: "
                f"{'; '.join(differing)} (resume=False or --no_resume begins anew)"
            )

    def _layout(self, before: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
        """First and last row of each shard.

        Rows that came or went since a run before, whose shards began and ended with the keys `before`, change the
        shards they are in and no others, unless a shard grew to twice its size. A shard may lose all its rows.
        """
        size, total = self.facts["shard_rows"], len(self.source)
        anew = [(first, min(total, first + size)) for first in range(0, total, size)]
        row = {key: i for i, key in enumerate(self.keys)}
        starts = [0]
        for ends, following in itertools.pairwise(before):
            found = row.get(following[0]) if following else None
            if found is None and ends and ends[1] in row:
                found = row[ends[1]] + 1
            starts.append(-1 if found is None else found)
        for i in reversed(range(len(starts))):
            if starts[i] < 0:
                starts[i] = starts[i + 1] if i + 1 < len(starts) else total
        if not before or starts != sorted(starts):
            return anew
        starts += range(starts[-1] + size, total, size)
        spans = list(zip(starts, [*starts[1:], total], strict=True))
        return spans if all(last - first < 2 * size for first, last in spans) else anew

    def _ends(self, rows: Sequence[int]) -> list[str]:
        """The keys of a shard's first and last row; none of a shard without rows."""
        return [self.keys[rows[0]], self.keys[rows[-1]]] if rows else []

    def _take_up(self, found: dict[str, Any]) -> None:
        """Notes of a finished folder's shards: its manifest goes once one of them is done again."""
        entries = {entry["name"]: entry for entry in found["shards"]}
        told = {entry["name"]: entry for entry in found.get("metadata") or []}
        for shard, fact in enumerate(found.get("sources") or []):
            note = self.notes / f"{shard}.json"
            metadata = told.get(self._told(shard))
            if not note.exists():
                files.write_json(note, {"shard": entries.get(self._name(shard)), "metadata": metadata, **fact})

    def _clear(self) -> None:
        for old in (
            self.folder / MANIFEST,
            *self.folder.glob(f"{self.kind}_*.npy"),
            *self.beside.glob("metadata_*.parquet"),
            *self.notes.glob("*.json"),
        ):
            old.unlink(missing_ok=True)

    def _note(self, shard: int) -> dict[str, Any] | None:
        """What is noted of a shard; None where nothing is that can be read, and the shard is done again."""
        try:
            note = files.read_json(self.notes / f"{shard}.json")
        except (OSError, ValueError):
            return None
        return note if manifests.is_note(note, self._name(shard), self._told(shard)) else None

    def _finished(self, shard: int) -> bool:
        note = self._note(shard)
        if note is None or (note["skipped"] and not self.skip):
            return False
        checks = [(self.folder / self._name(shard), note["shard"]["sha256"])] if note["shard"] else []
        if note["metadata"]:
            checks.append((self.folder.parent / note["metadata"]["name"], note["metadata"]["sha256"]))
        if not all(path.exists() and files.digest(path) == expected for path, expected in checks):
            return False
        if self.source.fingerprint_of(self.spans[shard]) != note["source"]:
            return False
        if note["metadata"] and note["told"] != self._told_of(rows := self._kept(shard, note)):
            # The same rows with other labels or images: what is told of them is written anew, and no more.
            told = writing.write_metadata(self.folder, shard, self.source.columns(rows))
            files.write_json(self.notes / f"{shard}.json", {**note, "metadata": told, "told": self._told_of(rows)})
        return True

    def _kept(self, shard: int, note: dict[str, Any]) -> list[int]:
        return [row for row in self.spans[shard] if self.keys[row] not in note["skipped"]]

    def _told_of(self, rows: Sequence[int]) -> str:
        return keys.order(str(value) for column in self.source.columns(rows).values() for value in column)

    def _compute(self, pending: list[int], total: int) -> int:
        """Encodes and writes this rank's missing shards; returns their rows."""
        size = self.facts["batch_size"]
        spans = [
            list(rows[first : first + size])
            for rows in (self.spans[i] for i in pending)
            for first in range(0, len(rows), size)
        ]
        done = total - sum(map(len, spans))
        self.tick(self.kind, done, total)
        encoded = self._encoded(spans)
        computed = 0
        if pending:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        for shard in pending:
            parts: list[Tensor] = []
            signatures: list[str] = []
            problems: dict[int, str] = {}
            rows = self.spans[shard]
            longer = None
            if self.kind == "text_emb":
                longer = self.model.truncated([self.source.texts[row] for row in rows])
            for first in range(0, len(rows), size):
                part, signed, wrong = next(encoded)
                parts += [part] if part is not None else []
                signatures += signed
                problems |= {rows[first + i]: reason for i, reason in wrong.items()}
                done += len(rows[first : first + size])
                self.tick(self.kind, done, total)
            kept = [row for row in rows if row not in problems]
            source = self.source.fingerprint_of(rows, signatures) if signatures else self.source.fingerprint_of(rows)
            skipped = {self.keys[row]: why for row, why in problems.items()}
            note = {"source": source, "told": self._told_of(kept), "skipped": skipped, "truncated": longer}
            computed += self._write(shard, parts, kept, note)
        return computed

    def _write(self, shard: int, parts: list[Tensor], kept: list[int], note: dict[str, Any]) -> int:
        path = self.notes / f"{shard}.json"
        if not parts:
            files.write_json(path, {"shard": None, "metadata": None, **note})
            (self.folder / self._name(shard)).unlink(missing_ok=True)
            (self.beside / f"metadata_{shard}.parquet").unlink(missing_ok=True)
            return 0
        x = torch.cat(parts).to(DTYPES[self.facts["stored"]])
        if not bool(torch.isfinite(x).all()):
            row = kept[int((~torch.isfinite(x)).any(1).nonzero()[0])]
            name = self.source.names[row] if self.kind == "img_emb" else repr(self.source.texts[row])
            raise ValueError(
                f"{self.kind}: expected finite {x.dtype} embeddings, got NaN or infinity in row {row}, {name}"
            )
        told = None
        if self.facts["has_metadata"]:
            told = writing.write_metadata(self.folder, shard, self.source.columns(kept))
        before = partial(self._write_note, path, {"metadata": told, **note})
        writing.write_shard(self.folder, self._name(shard), x, before)
        return len(x)

    @staticmethod
    def _write_note(path: Path, note: dict[str, Any], entry: dict[str, Any]) -> None:
        files.write_json(path, {"shard": entry, **note})

    def _encoded(self, spans: list[list[int]]) -> Iterator[tuple[Tensor | None, list[str], dict[int, str]]]:
        """Each span's embeddings, and of images their signatures and those that could not be read."""
        normalize = self.facts["normalized"]
        if self.kind == "text_emb":
            for span in spans:
                yield self.model.encode_texts([self.source.texts[i] for i in span], normalize=normalize).cpu(), [], {}
            return
        pin = self.model.device.type == "cuda"
        for batch in loading.batches(self.source.signed, self.model.preprocess, spans, self.workers, pin=pin):
            if batch.problems and not self.skip:
                raise ValueError(next(iter(batch.problems.values())))
            found = None if batch.images is None else self.model.encode_images(batch.images, normalize=normalize).cpu()
            yield found, batch.signatures, batch.problems

    def _skips(self) -> dict[str, str]:
        """What was skipped on any rank, once all are done. Rank 0 has the notes, and removes them when it finishes."""
        spans = enumerate(self.spans) if self.ranks.rank == 0 else ()
        notes = [self._note(shard) for shard, rows in spans if rows]
        return {key: why for note in notes if note for key, why in note["skipped"].items()}

    def _settle(self, skipped: dict[str, str]) -> None:
        self.skipped = skipped
        self.kept = [i for i, key in enumerate(self.keys) if key not in self.skipped]
        if not self.kept:
            why = next(iter(self.skipped.values()))
            raise ValueError(f"images: expected one that can be read, got {len(self.skipped)} that cannot: {why}")

    def _finish(self) -> None:
        notes = [self._note(i) if rows else {**NOTHING} for i, rows in enumerate(self.spans)]
        missing = [
            self._name(i)
            for i, note in enumerate(notes)
            if note is None or (note["shard"] and not (self.folder / self._name(i)).exists())
        ]
        if missing:
            raise ValueError(
                f"out: expected all shards to be there, got none of {', '.join(missing[:3])}: removed meanwhile"
            )
        whole = [note for note in notes if note]
        entries = [note["shard"] for note in whole if note["shard"]]
        told = [note["metadata"] for note in whole if note["metadata"]]
        ours = {entry["name"] for entry in (*entries, *told)}
        for old in self.folder.glob(f"{self.kind}_*.npy"):
            if old.name not in ours:
                old.unlink()
        for old in self.beside.glob("metadata_*.parquet"):
            if f"{self.beside.name}/{old.name}" not in ours:
                old.unlink()
        first = files.load_embeddings(self.folder / entries[0]["name"])
        facts = {
            **self.facts,
            "source": keys.order(note["source"] for note in whole),
            "order": keys.order(self.keys[i] for i in self.kept),
            "skipped": self.skipped,
            "transforms": [],
            "metadata": told if self.facts["has_metadata"] else None,
            "spans": [self._ends(rows) for rows in self.spans],
            "sources": [{key: note.get(key) for key in ("source", "told", "skipped", "truncated")} for note in whole],
        }
        if self.kind == "text_emb":
            # Not known of a model that does not say, and of shards that an earlier version wrote.
            longer = [note.get("truncated") for note in whole]
            facts["context"] = self.model.context
            facts["truncated"] = None if None in longer else sum(longer)
        manifests.write_manifest(self.folder, entries, first.shape[1], first.dtype, **facts)
        shutil.rmtree(self.notes, ignore_errors=True)

"""Tables of lists of every kind in Parquet, Arrow, folders of `datasets`, and Lance, with one fault or none."""

import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz_drawn import DIMS, REFUSED, Drawn, rows_of, values, whole


def _lists(rng: random.Random) -> tuple[Any, np.ndarray | None]:
    """A column of an Arrow table in several chunks, and its matrix."""
    import pyarrow as pa

    number = rng.choice((pa.float32(), pa.float32(), pa.float64(), pa.float16(), pa.int32(), pa.string()))
    rows, shape = rows_of(rng), rng.choice(("list", "large", "fixed", "tensor", "nested", "flat"))
    # Arrow itself aborts as it writes lists of the fixed size 0.
    matrix = values(rng, rows, rng.choice((DIMS, DIMS, DIMS, 7 if shape in ("fixed", "tensor") else 0, 7)))
    matrix = matrix.astype(number.to_pandas_dtype()) if pa.types.is_floating(number) else np.round(10 * matrix)
    held: list[Any] = matrix.tolist()
    right = pa.types.is_floating(number) and shape in ("list", "large", "fixed", "tensor")
    if number == pa.int32():
        held = [[int(x) for x in row] for row in held]
    elif number == pa.string():
        held = [[str(x) for x in row] for row in held]
    fault, at = rng.choice(("", "", "", "null", "inside", "ragged", "nan")), rng.randrange(max(1, rows))
    if rows and fault == "null" and shape != "tensor":
        held[at], right = None, False
    elif rows and fault == "inside" and held[at]:
        held[at][rng.randrange(len(held[at]))], right = None, False
    elif rows > 1 and fault == "ragged" and shape in ("list", "large") and held[at]:
        held[at], right = held[at][:-1] or [*held[at], held[at][0]], False
    elif rows and fault == "nan" and held[at] and pa.types.is_floating(number):
        held[at][0], right = float("nan"), False
    kinds = {
        "list": pa.list_(number),
        "large": pa.large_list(number),
        "fixed": pa.list_(number, matrix.shape[1]),
        "tensor": pa.list_(number, matrix.shape[1]),
        "nested": pa.list_(pa.list_(number)),
        "flat": number,
    }
    if shape == "nested":
        held = [row if row is None else [row] for row in held]
    elif shape == "flat":
        held = [row[0] if row else None for row in held]
    cut = rng.randrange(rows + 1)
    array = pa.chunked_array([pa.array(part, kinds[shape]) for part in (held[:cut], held[cut:])], kinds[shape])
    if shape == "tensor" and pa.types.is_floating(number) and matrix.shape[1]:
        kind = pa.fixed_shape_tensor(number, [matrix.shape[1]])
        array = pa.chunked_array([pa.ExtensionArray.from_storage(kind, chunk) for chunk in array.chunks], kind)
    return array, whole(matrix.astype(np.float64)) if right else REFUSED


def _table(rng: random.Random) -> tuple[Any, str, np.ndarray | None]:
    """A table with other columns beside, the name in brackets that chooses one, and its matrix."""
    import pyarrow as pa

    array, matrix = _lists(rng)
    rows = len(array)
    name = rng.choice(("embedding", "emb", "image", "ü"))
    columns = {"id": pa.array([f"row {i}" for i in range(rows)])}
    if rng.random() < 0.4:  # a dictionary, with or without nulls
        words = pa.array([None if rng.random() < 0.2 else rng.choice("abc") for _ in range(rows)], pa.string())
        columns["word"] = words.dictionary_encode()
    other = rng.random() < 0.3
    if other:
        columns["other"] = pa.array(values(rng, rows, 3).tolist(), pa.list_(pa.float32()))
    columns[name] = array
    keyed = rng.random() < 0.5
    if other and not keyed and name not in ("embedding", "emb"):
        matrix = REFUSED  # two could be meant
    if keyed and rng.random() < 0.1:
        return pa.table(columns), "[nothing]", REFUSED
    return pa.table(columns), f"[{name}]" if keyed else "", matrix


def _meant(names: list[str], argument: str) -> str:
    usual = ("embedding", "emb")
    return argument.strip("[]") or next((name for name in usual if name in names), names[-1])


def _matrix_of(table: Any, argument: str) -> np.ndarray:
    """The chosen column by Arrow's own conversion to Python."""
    found = table.column(_meant(table.column_names, argument))
    found.validate(full=True)
    return np.array([np.asarray(x, np.float64) for x in found.to_pylist()])


def parquet(folder: Path, rng: random.Random) -> Drawn:
    import pyarrow.parquet as pq

    table, key, matrix = _table(rng)
    path = folder / "drawn.parquet"
    pq.write_table(
        table,
        path,
        row_group_size=rng.choice((1, 7, 30, 1000)),
        compression=rng.choice(("none", "snappy", "zstd", "gzip")),
        use_dictionary=rng.random() < 0.5,
        data_page_size=rng.choice((64, 2**20)),
        data_page_version=rng.choice(("1.0", "2.0")),
    )

    def read() -> np.ndarray:
        with pq.ParquetFile(path) as file:
            return _matrix_of(file.read([_meant(file.schema_arrow.names, key)]), key)

    return Drawn(f"drawn.parquet{key}", path, matrix, read)


def arrow(folder: Path, rng: random.Random) -> Drawn:
    import pyarrow as pa

    table, key, matrix = _table(rng)
    path = folder / f"drawn{rng.choice(('.arrow', '.feather'))}"
    as_file = rng.random() < 0.5
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, rng.choice((1, 7, 1000)))

    def read() -> np.ndarray:
        with pa.memory_map(str(path)) as source:
            whole = (pa.ipc.open_file if as_file else pa.ipc.open_stream)(source).read_all()
            whole.validate(full=True)
            return _matrix_of(whole, key)

    return Drawn(f"{path.name}{key}", path, matrix, read)


def saved_by_datasets(folder: Path, rng: random.Random) -> Drawn:
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    table, key, matrix = _table(rng)
    path = folder / "drawn"
    try:
        made = datasets.Dataset(table)
        made.save_to_disk(str(path), num_shards=rng.choice((1, 1, 3)) if len(table) > 3 else 1)
    except (TypeError, ValueError, NotImplementedError, pa.ArrowException):  # a type that datasets does not know
        return arrow(folder, rng)
    file = rng.choice(sorted(path.rglob("*.arrow")))
    return Drawn(f"drawn{key}", file, matrix, lambda: _matrix_of(datasets.load_from_disk(str(path)).data.table, key))


def lance(folder: Path, rng: random.Random) -> Drawn:
    import lance as library

    table, key, matrix = _table(rng)
    path = folder / "drawn.lance"
    try:
        library.write_dataset(table, path, max_rows_per_file=rng.choice((7, 1000)))
    except BaseException as error:  # a type that Lance does not know; it panics at some, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return arrow(folder, rng)
    file = rng.choice(sorted(p for p in path.rglob("*") if p.is_file()))
    return Drawn(f"drawn.lance{key}", file, matrix, lambda: _matrix_of(library.dataset(path).to_table(), key))

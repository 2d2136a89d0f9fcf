"""One reproduction on files, for all tests of what it writes: the fixture `reproduced`."""

from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

OURS = ("fig1", "fig2", "fig8", "fig9", "fig10", "baselines")
Reproduced = namedtuple("Reproduced", "inputs out")


def given(folder: Path) -> tuple:
    """The options that name the embeddings in a folder, and small sizes."""
    files = ("--embeddings", "images", "texts", "--paraphrase", "other", "third")
    return (*(word if word.startswith("-") else folder / f"{word}.npy" for word in files), "--quick")


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory):
    """Sixty captions and images, a gap of which most is orthogonal, two rewordings (`inputs`); the report (`out`)."""
    folder = tmp_path_factory.mktemp("reproduced")
    generator = np.random.default_rng(0)
    texts = np.zeros((60, 32))
    texts[:, :12] = generator.standard_normal((60, 12)) / 12**0.5
    images = texts + 0.08 * generator.standard_normal((60, 32))
    images[:, 20] += 1.0
    images[:, 0] += 1.2
    arrays = {
        "images": images,
        "texts": texts,
        "other": texts + 0.05 * generator.standard_normal((60, 32)),
        "third": texts + 0.05 * generator.standard_normal((60, 32)),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.float32))
    from gapkern.cli import main

    out = folder / "report"
    assert main(["reproduce", *OURS, *map(str, given(folder)), "--out", str(out)]) == 0
    return Reproduced(folder, out)

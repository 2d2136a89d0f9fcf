"""`import gapkern` is light; every public submodule is there once it is named."""

import pkgutil

import pytest

import gapkern
from tests import warm

HEAVY = (
    "faiss pandas pyarrow matplotlib open_clip torchvision sklearn scipy PIL rich safetensors.torch gapkern.retrieval "
    "gapkern.cli gapkern.evaluation gapkern.embeddings gapkern.experiments gapkern.theory gapkern.dynamics"
)


def _fresh(code):
    done = warm.run(f"import warnings; warnings.simplefilter('error'); {code}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_alone_loads_torch_and_numpy():
    code = "import torch, numpy, sys; print(*sys.modules); import gapkern; print(*sys.modules)"
    before, after = ({*line.split()} for line in _fresh(code).splitlines())
    assert not (after - before) & {*HEAVY.split()}
    assert {"gapkern", "gapkern.losses"} <= after


def test_submodules_load_when_they_are_named():
    assert (
        _fresh("import gapkern; print(gapkern.theory.__name__, gapkern.layout.natural('a1')[1][1])")
        == "gapkern.theory 1\n"
    )
    pytest.importorskip("faiss")
    assert "GapIndex" in _fresh("import gapkern; print(gapkern.retrieval.GapIndex)")


def test_every_public_submodule_is_an_attribute():
    public = [name for _, name, _ in pkgutil.iter_modules(gapkern.__path__) if not name.startswith("_")]
    assert {*public} <= {*dir(gapkern)}
    for name in public:
        assert getattr(gapkern, name) is not None
    with pytest.raises(AttributeError, match="module 'gapkern' has no attribute 'retrievel'"):
        _ = gapkern.retrievel

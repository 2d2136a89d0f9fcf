"""Imports run one way: from the command line down to the operators, without circles, and names keep their privacy."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top. A place (a module or a package directly below gapkern) imports what lies below it, never
# above it or beside it; "" is gapkern/__init__.py. CONTRIBUTING.md says it in a line.
LAYERS = (
    (
        "_ambient",
        "_check",
        "_compare",
        "_lock",
        "_logs",
        "_memory",
        "_progress",
        "_rows",
        "_threads",
        "_version",
        "memory",
        "reference",
        "testing",
    ),
    ("_formats", "_load", "_search", "figures"),
    ("_writing", "layout"),
    ("files", "ops"),
    ("losses", "perturb", "prompts", "ranks"),
    ("captions", "gap", "models"),
    ("dynamics", "embeddings", "robustness"),
    ("", "datasets", "theory"),
    ("integrations", "retrieval"),
    ("evaluation",),
    ("experiments", "selfcheck"),
    ("cli",),
    ("__main__",),
)
NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, by NamedTuple's own contract
LEVEL = {place: level for level, layer in enumerate(LAYERS) for place in layer}


class Import(NamedTuple):
    """`module`, at `where` (file:line), imports `name` of `target`; None where the module itself is meant."""

    module: str
    where: str
    target: str
    name: str | None


def modules(root: Path) -> dict[str, Path]:
    names = {}
    for path in sorted((root / "gapkern").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def place(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(known: dict[str, Path], root: Path) -> Iterator[Import]:
    """Every import of our own modules, those inside functions too."""
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                yield from (Import(module, where, a.name, None) for a in node.names if _ours(a.name))
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{where}: a relative import"
                for a in node.names if _ours(node.module) else ():
                    whole = f"{node.module}.{a.name}"
                    itself = whole in known
                    yield Import(module, where, whole if itself else node.module, None if itself else a.name)


def _ours(name: str) -> bool:
    return name == "gapkern" or name.startswith("gapkern.")


def upward(found: Iterator[Import]) -> list[str]:
    faults = []
    for each in found:
        here, there = place(each.module), place(each.target)
        if here != there and LEVEL[there] >= LEVEL[here]:
            faults.append(f"{each.where}: {each.module} imports {each.target}, which lies no lower")
    return faults


def private(found: Iterator[Import]) -> list[str]:
    """What begins with an underscore is for its own package; modules directly below gapkern are for all of it."""
    faults = []
    for each in found:
        if place(each.module) == place(each.target) or each.target == "gapkern._version":
            continue
        names = [*each.target.split(".")[2:], *([each.name] if each.name else [])]
        faults += [f"{each.where}: {each.target} keeps {name} to itself" for name in names if name.startswith("_")]
    return faults


def foreign(known: dict[str, Path], root: Path) -> list[str]:
    """Private attributes of imported names and of objects whose class does not have them, by name alone."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in known.items()}
    own: dict[str, set[str]] = {}
    for module, tree in trees.items():
        own.setdefault(place(module), set()).update(_defined(tree))
    ours = set().union(*own.values())
    faults = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if node.attr in NAMED_TUPLES:
                continue
            if node.attr in ours and node.attr not in own[place(module)]:
                where = f"{known[module].relative_to(root)}:{node.lineno}"
                faults.append(f"{where}: {ast.unparse(node)} is private to another package")
    return faults


def _defined(tree: ast.AST) -> Iterator[str]:
    """The names of functions, classes, and what is assigned, plainly or to an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in number:
                visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == number[module]:
            start = stack.index(module)
            if len(stack) - start > 1:
                found.append(sorted(stack[start:]))
            del stack[start:]

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


def graph_of(known: dict[str, Path], found: list[Import]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {module: set() for module in known}
    for each in found:
        if each.target in known and each.target != each.module:
            graph[each.module].add(each.target)
    return graph


@pytest.fixture(scope="module")
def house():
    known = modules(ROOT)
    return known, list(imports(known, ROOT))


def test_every_place_has_a_layer(house):
    places = {place(module) for module in house[0]}
    assert not places - LEVEL.keys(), "give them a layer in LAYERS"
    assert not LEVEL.keys() - places, "they are no more"


def test_no_import_goes_up(house):
    assert not upward(house[1])


def test_no_circles(house):
    assert not circles(graph_of(*house))


def test_private_names_stay_in_their_package(house):
    assert not private(house[1])
    assert not foreign(house[0], ROOT)


def test_the_oracles_import_nothing_of_ours(house):
    assert not [each for each in house[1] if place(each.module) == "reference" != place(each.target)]


def test_each_fault_is_found(tmp_path):
    """A house with one fault of each kind."""
    files = {
        "__init__.py": "",
        "files.py": "def f():\n    from gapkern import cli\n",
        "cli/__init__.py": "from gapkern.gap.shift import _moved\nimport gapkern.gap._hidden\n",
        "gap/__init__.py": "",
        "gap/shift.py": "from gapkern.gap import metrics\ndef _moved(): ...\nclass A:\n    _kept = 1\n",
        "gap/metrics.py": "import gapkern.gap.shift\n",
        "gap/_hidden.py": "",
        "cli/gap.py": "from gapkern.gap.shift import A\nprint(A()._kept)\n",
    }
    for name, text in files.items():
        path = tmp_path / "gapkern" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    known = modules(tmp_path)
    found = list(imports(known, tmp_path))
    assert upward(found) == ["gapkern/files.py:2: gapkern.files imports gapkern.cli, which lies no lower"]
    assert circles(graph_of(known, found)) == [["gapkern.gap.metrics", "gapkern.gap.shift"]]
    assert private(found) == [
        "gapkern/cli/__init__.py:1: gapkern.gap.shift keeps _moved to itself",
        "gapkern/cli/__init__.py:2: gapkern.gap._hidden keeps _hidden to itself",
    ]
    assert foreign(known, tmp_path) == ["gapkern/cli/gap.py:2: A()._kept is private to another package"]

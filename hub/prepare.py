"""A project for `kernel-builder`, of the Hugging Face hub, from this checkout: python hub/prepare.py FOLDER

FOLDER receives csrc/, with a file per instruction set that names its own target, since the builder compiles with the
same flags on every processor; build.toml with its lists completed; and torch-ext/gapkern/, the Python files that the
losses, the gap, perturbations and robustness need, with relative imports and the builder's name for the operators.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
SERVED = ("gapkern", "gapkern.reference")  # and what they import

# The builder writes _ops.py; its import loads the library.
LOAD = '''"""The operators are loaded as _ops is imported."""

from . import _ops


def load() -> None:
    """There is nothing left to do."""
'''
WRAPPER = """// Written by hub/prepare.py.
#if {condition}
{target}#define GAPKERN_ISA {isa}
#define GAPKERN_ISA_{isa}
#include "{source}"
#endif
"""


def instruction_sets() -> dict[str, str]:
    """The target attribute of each, from cmake/Simd.cmake."""
    text = (ROOT / "cmake" / "Simd.cmake").read_text()
    flags = {"portable": ""} | dict(re.findall(r"set\(GAPKERN_FLAGS_(\w+) (.+)\)", text))
    flags = {isa: re.sub(r"\$\{GAPKERN_FLAGS_(\w+)\}", lambda m: flags[m[1]], said) for isa, said in flags.items()}
    return {isa: ",".join(re.sub("^-m", "", flag) for flag in said.strip('"').split()) for isa, said in flags.items()}


def per_instruction_set() -> list[str]:
    """The sources that CMakeLists.txt compiles once for each."""
    text = (ROOT / "CMakeLists.txt").read_text()
    text = re.sub(
        r"foreach\((\w+) ([^)]+)\)\n(.*?)endforeach\(\)",
        lambda m: "".join(m[3].replace(f"${{{m[1]}}}", each) for each in m[2].split()),
        text,
        flags=re.DOTALL,
    )
    return re.findall(r"gapkern_simd_source\(\w+ (\S+?\.cpp)", text)


def write_native(folder: Path) -> None:
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("*.json", "facts.cpp"))
    text = (HUB / "build.toml").read_text()
    for source in per_instruction_set():
        included = (folder / source).rename((folder / source).with_suffix(".inc")).relative_to(folder)
        names = [str(included)]
        for isa, target in instruction_sets().items():
            condition = "defined(__x86_64__)" if target else "!defined(__aarch64__)"
            wrapper = included.with_name(f"{included.stem}_{isa}.cpp")
            (folder / wrapper).write_text(
                WRAPPER.format(
                    condition="defined(__aarch64__)" if isa.startswith("neon") else condition,
                    target=f'#pragma GCC target("{target}")\n' if target else "",
                    isa=isa,
                    source=included.relative_to("csrc"),
                )
            )
            names.append(str(wrapper))
        text = text.replace(f'"{source}"', ", ".join(f'"{name}"' for name in names))
    for pattern in re.findall(r'"(csrc/\*\*[^"]+)"', text):
        names = sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
        text = text.replace(f'"{pattern}"', ", ".join(f'"{name}"' for name in names))
    (folder / "build.toml").write_text(text)


def file_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    return next((each for each in (path / "__init__.py", path.with_suffix(".py")) if each.exists()), None)


def imported(path: Path) -> set[str]:
    """Modules of ours that a file names anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import) and any(alias.name.startswith("gapkern") for alias in node.names):
            sys.exit(f"{path}:{node.lineno}: expected `from gapkern... import`, which can be made relative")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gapkern":
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if file_of(name)} - {"gapkern"}


def modules() -> list[str]:
    """What is served, and everything of ours that it imports."""
    waiting, found = list(SERVED), set()
    while waiting:
        name = waiting.pop()
        if name in found or name == "gapkern._load":
            continue
        found.add(name)
        path = file_of(name)
        assert path is not None, name
        parents = [name.rsplit(".", up)[0] for up in range(1, name.count("."))]
        waiting += [*imported(path), *parents]
    return sorted(found)


def moved(text: str, level: int) -> str:
    """A file's text with imports relative to its package, `level` folders deep, and operators by _ops.py."""
    up = "." * level
    text = re.sub(r"^(\s*)from gapkern\.([\w.]+) import", rf"\1from {up}\2 import", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from gapkern import", rf"\1from {up} import", text, flags=re.MULTILINE)
    renamed = text.replace("torch.ops.gapkern", "_kernel_ops")
    renamed = re.sub(r'(f?)"gapkern::([^"]+)"', r'add_op_namespace_prefix(\1"\2")', renamed)
    renamed = renamed.replace('Library("gapkern", ', "Library(_kernel_ops.name, ")
    if renamed == text:
        return text
    lines = renamed.splitlines(keepends=True)
    first = next(node for node in ast.parse(renamed).body if isinstance(node, ast.Import | ast.ImportFrom))
    lines.insert(first.lineno - 1, f"from {up}_ops import add_op_namespace_prefix, ops as _kernel_ops\n")
    return "".join(lines)


def write_python(folder: Path) -> None:
    package = folder / "torch-ext" / "gapkern"
    for name in modules():
        path = file_of(name)
        assert path is not None, name
        below = path.relative_to(ROOT / "gapkern")
        target = package / below
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(moved(path.read_text(), len(below.parts)))
    (package / "_load.py").write_text(LOAD)


def prepare(folder: Path) -> None:
    """Writes the project into `folder`, which must not exist or be empty."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder}: expected an empty folder or none")
    folder.mkdir(parents=True, exist_ok=True)
    write_native(folder)
    write_python(folder)
    shutil.copy(HUB / "torch_binding.cpp", folder / "torch-ext")
    shutil.copy(HUB / "flake.nix", folder)
    shutil.copy(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]))

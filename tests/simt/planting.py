"""The programs of tests/simt with a mistake in the kernels.

Most of the time goes to the compiler, and most of that to the code around the kernels. So that is compiled once, with
right kernels, and a mistake only with the kernels: of functions that are in both objects the linker takes the first.
"""

import os
import re
import subprocess
from pathlib import Path

SIMT = Path(__file__).resolve().parent
SOURCE = SIMT.parent.parent / "csrc"
FOLDERS = dict.fromkeys(("classes", "sm90", "sm90_masked"), "contrastive")  # where not named as the capability
COMPILER = ("c++", "-std=c++17", "-O0", "-w", "-ffp-contract=off")
# Chooses among overloads by their arguments.
OF = "template <class... A> struct Of { template <class R> static constexpr auto of(R (*f)(A...)) { return f; } };\n"


class Planting:
    """Compiles in `work`, a folder."""

    def __init__(self, capability: str, work: Path):
        self.work, self.program = work, SIMT / f"{capability}.cpp"
        self.folder = FOLDERS.get(capability, capability)
        self.texts = {path.name: path.read_text() for path in (SOURCE / self.folder).glob("*.cuh")}
        standard = {line for path in SIMT.glob("*.*") for line in _includes(path, "<")}
        (work / "standard.h").write_text("\n".join(sorted(standard)) + "\n")
        self._compile(work, "-x", "c++-header", work / "standard.h", "-o", work / "standard.h.gch", standard=False)
        self._compile(work, "-O1", "-c", self.program, "-o", work / "around.o", standard=False)
        self._kernels = self._emitting()

    def __call__(self, number: int, mistake: tuple[str, str]) -> str | None:
        """The mistake in words, unless its program says that it is one."""
        right, wrong = mistake
        changed = self.work / str(number)
        (changed / self.folder).mkdir(parents=True)
        for name, text in self.texts.items():
            if right in text:
                (changed / self.folder / name).write_text(text.replace(right, wrong))
        assert list(changed.rglob("*.cuh")), f"nothing to plant it in: {right!r}"
        if self.kernels_fail(changed):
            return None
        # In a barrier, which only a longer run finds, or in what the code around the kernels calls by itself.
        whole = changed / "whole"
        self._compile(changed, self.program, "-o", whole)
        if _fails(whole, GAPKERN_SIMT_ERRORS="1") or _fails(whole):
            return None
        return f"{right!r} changed to {wrong!r} went unnoticed"

    def kernels_fail(self, changed: Path) -> bool:
        """Whether results are wrong with the headers in `changed`; those that it lacks are the right ones."""
        (changed / "kernels.cpp").write_text(self._kernels)
        program = changed / "program"
        around = self.work / "around.o"
        self._compile(changed, changed / "kernels.cpp", around, "-Wl,-z,muldefs", "-o", program)
        return _fails(program, GAPKERN_SIMT_ERRORS="1")

    def _compile(self, changed: Path, *arguments: object, standard: bool = True) -> None:
        first = ["-include", self.work / "standard.h"] if standard else []
        include = ["-I", changed, "-I", SIMT, "-I", SOURCE]
        subprocess.run([*COMPILER, *first, *include, *arguments], check=True)

    def _emitting(self) -> str:
        """The source of an object that has the kernels that the program launches."""
        text = "".join([*self.texts.values(), *(path.read_text() for path in (SOURCE / "common").glob("*.cuh"))])
        names = set(re.findall(r"__global__\s+void\s+(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", text)))
        command = ["nm", "-C", "--defined-only", self.work / "around.o"]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = [*_includes(self.program, '"'), OF]
        for symbol in re.findall(r"^\w+ [WT] (.*)$", symbols, re.M):
            template = re.fullmatch(r"void (gapkern::[\w:]*?(\w+)<.*>\(.*\))", symbol)
            plain = re.fullmatch(r"(gapkern::[\w:]*?(\w+))\((.*)\)", symbol)
            if template and template[2] in names:
                lines.append(f"template {symbol};")
            elif plain and plain[2] in names:
                lines.append(f"[[gnu::used]] static const auto kept{len(lines)} = Of<{plain[3]}>::of(&{plain[1]});")
        return "\n".join(lines) + "\n"


def _includes(path: Path, opening: str) -> list[str]:
    return [line for line in path.read_text().split("\n") if line.startswith(f"#include {opening}")]


def _fails(program: Path, **environment: str) -> bool:
    """Whether a program finds a fault, until it says so."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([program], text=True, env={**os.environ, **environment}, **streams) as running:
        if any(line.startswith("FAILED") for line in running.stdout):
            running.kill()
    return running.returncode != 0

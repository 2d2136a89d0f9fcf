"""What the compiler made of every device kernel: read from the built library, compared with csrc/kernel_gates.json.

python tests/kernel_gates.py           compares
python tests/kernel_gates.py --write   writes the table anew; its difference belongs in the commit that changed a kernel

The table holds, per architecture and kernel: registers, bytes of stack and of static shared memory, and counts of
instructions: loads and stores of local memory (spills, and arrays that did not stay in registers), exponentials, matrix
products of Hopper's (HGMMA), branches (BRA) and points where divergent threads meet again (BSSY), all instructions, and
issue slots: the cycles of a scheduler that all of them take at the rates of CUDA's table of arithmetic throughput. A
count that grew is a fault: a branch for every element, or a library function where a polynomial does, is seen here.
"""

import ctypes
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "gapkern" / "lib" / "libgapkern_cuda.so"
TABLE = ROOT / "csrc" / "kernel_gates.json"

SHARED_MEMORY = 232_448  # bytes, of a Hopper block
# Registers may differ by what ptxas gives back for an unrelated change: one allocation unit.
SPARE_REGISTERS = 8
# Static exponentials a kernel must have, or a multiple where the compiler made copies of the loop. The tiles of
# contrastive/kernels.cuh have 32 elements a thread and form two exponentials for each; the sigmoid losses' one.
EXPONENTIALS = {
    "contrastive::lse_tiles<float": 64,
    "contrastive::lse_gradient<float": 64,
    "contrastive::sigmoid_tiles<float": 32,
    "contrastive::sigmoid_of_ids<float": 32,
}

_COUNTED = {
    "LDL": "local_loads",
    "STL": "local_stores",
    "MUFU.EX2": "exponentials",
    "HGMMA": "hgmma",
    "BRA": "branches",
    "BSSY": "reconvergences",
}
_MUST_NOT_GROW = ("branches", "reconvergences", "instructions", "issue_slots")
# Cycles of one of a multiprocessor's four schedulers for an instruction of a warp: 32 lanes over a quarter of the rate
# that the CUDA C++ Programming Guide gives for compute capability 9.0. One where it issues to a unit of its own.
_SLOTS = {"MUFU": 8, "SHFL": 4, "REDUX": 8, "NOP": 0}
_HALF_RATE = re.compile(
    r"(IADD|IMAD|LOP|SHF|LEA|ISETP|FSETP|DSETP|SEL|FSEL|IMNMX|VIMNMX|FMNMX|PRMT|F2F|F2I|I2F|DADD|DMUL|DFMA|VOTE|POPC|FLO)"
)
_USAGE = re.compile(r" Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def find_tool(name: str) -> str | None:
    """A CUDA binary tool: from PATH, beside nvcc, or from its Python wheel."""
    found = shutil.which(name)
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent] if nvcc else []
    places += [Path(folder) / "nvidia" / cuda / "bin" for folder in sys.path for cuda in ("cu13", "cuda_" + name)]
    return found or next((str(place / name) for place in places if (place / name).exists()), None)


def _cuobjdump(*arguments: str) -> str:
    tool, disassembler = find_tool("cuobjdump"), find_tool("nvdisasm")
    if tool is None or disassembler is None:
        raise FileNotFoundError("cuobjdump and nvdisasm; run `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`")
    path = f"{Path(disassembler).parent}:/usr/bin:/bin"
    done = subprocess.run([tool, *arguments, LIBRARY], capture_output=True, text=True, env={"PATH": path})
    if done.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def demangled(symbol: str) -> str:
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    return symbol if status.value else ctypes.string_at(text).decode()


def short(name: str) -> str:
    """A kernel's name without its parameters, our namespace and what depends on where a file lies.

    A name longer than a line keeps its beginning, whatever of ours is in it, and a digest of the rest.

    Example:
        >>> short("void gapkern::meanshift::sum_rows<gapkern::Half, 8>(gapkern::Half const*, long, long, double*)")
        'meanshift::sum_rows<Half, 8>'
    """
    depth = 0
    for end, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not name.startswith("(anonymous namespace)", end):
            name = name[:end]
            break
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name)
    name = re.sub(r"\((?:int|bool|long|unsigned int)\)", "", name)
    name = name.removeprefix("void ").replace("gapkern::", "").replace("> >", ">>")
    if len(name) <= 100:
        return name
    ours = dict.fromkeys(re.findall(r"\b(?:contrastive|meanshift|perturb|robustness)::\w+(?:::\w+)*", name))
    shape = dict.fromkeys(re.findall(r"KernelTmaWarpSpecialized\w+|MainloopSm90\w+", name))
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return " ".join([name.partition("<")[0], *shape, *ours, digest])


def compiler() -> str | None:
    """Major and minor version of the nvcc that CMake built with; None where its build folder is gone."""
    for path in ROOT.glob(f"build/cmake-{sys.implementation.cache_tag}/CMakeFiles/*/CMakeCUDACompiler.cmake"):
        version = re.search(r'CMAKE_CUDA_COMPILER_VERSION "(\d+\.\d+)', path.read_text())
        if version:
            return version[1]
    return None


def measure() -> dict[str, Any]:
    """The table of the built library."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    symbols: dict[str, str] = {}
    for part in _cuobjdump("--dump-resource-usage").split("arch = ")[1:]:
        of = kernels.setdefault(part.split()[0], {})
        for symbol, registers, stack, shared in _USAGE.findall(part):
            name = symbols.setdefault(symbol, short(demangled(symbol)))
            if name in of:
                raise RuntimeError(f"two kernels are called {name}")
            of[name] = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
    arch = symbol = ""
    counts: Counter[tuple[str, str, str]] = Counter()
    for line in _cuobjdump("--dump-sass").split("\n"):
        if "arch = " in line:
            arch = line.split("arch = ")[1].strip()
        elif "Function : " in line:
            symbol = line.split("Function : ")[1].strip()
        elif line.startswith("        /*") and not line.startswith("        /* 0x"):
            words = line.split(None, 3)
            code = words[2] if words[1].startswith("@") else words[1]
            counts[arch, symbol, code.rstrip(";")] += 1
    for (arch, symbol, code), count in counts.items():
        row, operation = kernels[arch][symbols[symbol]], code.partition(".")[0]
        key = _COUNTED.get("MUFU.EX2" if code.startswith("MUFU.EX2") else operation)
        if key:
            row[key] = row.get(key, 0) + count
        slots = _SLOTS.get(operation, 2 if _HALF_RATE.match(operation) else 1)
        row["instructions"] = row.get("instructions", 0) + count * (operation != "NOP")
        row["issue_slots"] = row.get("issue_slots", 0) + count * slots
    order = ["registers", "stack", "shared", *_COUNTED.values(), "instructions", "issue_slots"]
    for of in kernels.values():
        for name, row in of.items():
            of[name] = {key: row[key] for key in order if key in row}
    ptx = _cuobjdump("--dump-ptx")
    return {
        "nvcc": compiler(),
        "ptx": sorted(set(re.findall(r"^\.target (\w+)", ptx, re.M))),
        "kernels": {arch: dict(sorted(of.items())) for arch, of in sorted(kernels.items())},
    }


def measured() -> dict[str, Any]:
    """`measure`, remembered in build/ for this library, this file and its tool: disassembling takes ten seconds."""
    tool = find_tool("cuobjdump")
    facts = [str(compiler()), str(tool)]
    digest = hashlib.sha256(LIBRARY.read_bytes() + Path(__file__).read_bytes() + "\n".join(facts).encode()).hexdigest()
    kept = ROOT / "build" / "kernel_gates" / f"{digest}.json"
    if not kept.exists():
        text = json.dumps(measure())
        shutil.rmtree(kept.parent, ignore_errors=True)
        kept.parent.mkdir(parents=True)
        kept.write_text(text)
    return json.loads(kept.read_text())


def faults(found: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What of the library is not as the table and the design have it; one line each."""
    wrong = [f"{arch}: no machine code" for arch in sorted(set(table["kernels"]) - set(found["kernels"]))]
    if not found["ptx"]:
        wrong.append("no PTX, so that newer devices have no kernels")
    for arch in sorted({*found["kernels"], *table["kernels"]}):
        ours, theirs = (side["kernels"].get(arch, {}) for side in (found, table))
        wrong += [f"{arch} {name}: not in the table" for name in ours if name not in theirs]
        wrong += [f"{arch} {name}: in the table, not in the library" for name in theirs if name not in ours]
        for name in (name for name in ours if name in theirs):
            wrong += [f"{arch} {name}: {fault}" for fault in _kernel_faults(name, ours[name], theirs[name])]
    return wrong


def expected(table: dict[str, Any], hopper: bool) -> dict[str, Any]:
    """The table of a build with or without the Hopper kernels, which need CUTLASS's headers."""
    if hopper:
        return table
    kept = {
        arch: {name: row for name, row in rows.items() if "sm90::" not in name}
        for arch, rows in table["kernels"].items()
    }
    return {**table, "kernels": {arch: rows for arch, rows in kept.items() if rows}}


def _kernel_faults(name: str, found: dict[str, int], wanted: dict[str, int]) -> list[str]:
    wrong = []
    for key in ("stack", "local_loads", "local_stores", "exponentials"):
        if found.get(key, 0) != wanted.get(key, 0):
            wrong.append(f"{key}: expected {wanted.get(key, 0)}, found {found.get(key, 0)}")
    for key in _MUST_NOT_GROW:
        if found.get(key, 0) > wanted.get(key, 0):
            wrong.append(f"{key}: at most {wanted.get(key, 0)}, found {found.get(key, 0)}")
    if found["registers"] > wanted["registers"] + SPARE_REGISTERS:
        wrong.append(f"registers: at most {wanted['registers']} + {SPARE_REGISTERS}, found {found['registers']}")
    if found["shared"] > SHARED_MEMORY:
        wrong.append(f"shared: at most {SHARED_MEMORY} bytes, found {found['shared']}")
    if (wanted.get("hgmma") or name.startswith("cutlass::")) and not found.get("hgmma"):
        wrong.append("hgmma: the tensor cores' instructions are gone")
    for prefix, count in EXPONENTIALS.items():
        here = found.get("exponentials", 0)
        if name.startswith(prefix) and (not here or here % count):
            wrong.append(f"exponentials: expected a multiple of {count} (elements a thread), found {here}")
    return wrong


def main() -> int:
    from gapkern import files

    found = measure()
    if sys.argv[1:] == ["--write"]:
        text = json.dumps(found, indent=1)
        text = re.sub(r'\{\n\s+("registers[^}]*?)\n\s+\}', lambda m: "{" + re.sub(r"\n\s+", " ", m[1]) + "}", text)
        files.write(TABLE, lambda path: path.write_text(text + "\n"))
        print(f"written: {TABLE.relative_to(ROOT)}")
        return 0
    wrong = faults(found, json.loads(TABLE.read_text()))
    print("\n".join(wrong) or "every kernel is as the table has it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

"""hub/: a project for the Hugging Face hub's kernel-builder, read, compiled and loaded as its tools do.

The builder needs Nix, which the tests do without. `kernels`, the package that loads what was built, contains its parser
of build.toml (edition 5, in kernels 0.17) and the choice among builds. `compiled` does what the builder's CMake files
do with build.toml: every source with its flags and TORCH_EXTENSION_NAME, linked into one library, a Python module.
"""

import ast
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import gapkern

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

kernels = pytest.importorskip("kernels", reason="kernels is not installed")

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "gapkern" / "lib" / "libgapkern_cpu.so"

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and (ROOT / "hub").is_dir()), reason="the sources are not beside the tests"
)

# What a user does with a kernel, and what must come of it.
USE = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel

def use(module):
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(257, 96), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    loss = module.ClipLoss()(images, texts, scale)
    loss.backward()
    many = module.info_nce_loss(images, texts, scale, ids=torch.arange(257) % 50)
    queries, gallery = images.detach(), texts.detach()
    shift = module.MeanShift().fit(gallery, queries)
    robust = module.robustness.robustness(queries, gallery, module.Gaussian(0.04), shift=shift)
    noisy = module.perturb.perturb(gallery, module.Gaussian(0.04), seed=3)
    return [loss.detach(), images.grad, texts.grad, scale.grad, many.detach(), shift.transform(gallery), noisy,
            torch.tensor(robust.robustness)]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "project"
    subprocess.run([sys.executable, ROOT / "hub" / "prepare.py", folder], check=True)
    return folder


def lay_out(project, build, identifier, operators):
    """One build in the builder's layout, without its library: build/VARIANT with the Python files and metadata.json."""
    variant = build / f"torch-stable-abi211-cpu-{platform.machine()}-linux"
    package = project / "torch-ext" / "gapkern"
    for path in package.rglob("*.py"):
        target = variant / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    (variant / "_ops.py").write_text(
        f"import torch\n{operators}\n"
        f"def add_op_namespace_prefix(op_name: str):\n    return f'{{ops.name}}::{{op_name}}'\n"
    )
    metadata = {"name": "gapkern", "id": identifier, "version": 0, "license": "Apache-2.0", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}}))
    return variant


def ours():
    names = {}
    exec(USE, names)
    return names["use"](gapkern)


def run(code, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", USE + code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_the_hubs_parser_reads_the_project(project, tmp_path):
    for folder in (ROOT / "hub", project):
        assert "Cuda" in str(kernels._rust.Build.open(folder).general)
    text = (project / "build.toml").read_text()
    wrong = {
        'name = "gapkern"': 'name = "gap_kern"',
        "edition = 5": "edition = 4",
        "cxx-flags": "cxx-flag",
        '"cutlass_4_0"': '"cutlass_4_2"',
        'license = "Apache-2.0"\n': "",
    }
    for right, mistake in wrong.items():
        assert right in text
        (tmp_path / "build.toml").write_text(text.replace(right, mistake))
        with pytest.raises(ValueError, match=r"build\.toml"):
            kernels._rust.Build.open(tmp_path)


def test_every_source_is_built_as_cmake_builds_it(project):
    """The same sources and flags as CMakeLists.txt's, for each instruction set, on both backends."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    build = tomllib.loads((ROOT / "hub" / "build.toml").read_text())["kernel"]
    host = set(re.search(r"add_library\(gapkern_cpu SHARED(.*?)\)", cmake, re.DOTALL)[1].split()) - {"csrc/facts.cpp"}
    cuda = set(re.search(r"add_library\(gapkern_cuda SHARED(.*?)\)", cmake, re.DOTALL)[1].split())
    sm90 = set(re.findall(r"csrc/\S+\.cu\b", (ROOT / "cmake" / "Sm90.cmake").read_text()))
    flags = re.search(r"PRIVATE (-O3 .*)", (ROOT / "cmake" / "Simd.cmake").read_text())[1].split()
    for suffix in ("", "-beside-cuda"):
        assert set(build[f"host{suffix}"]["src"]) == host
        assert set(flags) <= set(build[f"vectors{suffix}"]["cxx-flags"])
        assert {*flags[:-1], "-ffp-contract=off"} <= set(build[f"noise{suffix}"]["cxx-flags"])
    assert set(build["cuda"]["src"]) | set(build["noise-cuda"]["src"]) == cuda
    assert set(build["hopper"]["src"]) == sm90

    prepared = tomllib.loads((project / "build.toml").read_text())
    listed = {name for kernel in prepared["kernel"].values() for name in kernel["src"]} | set(prepared["torch"]["src"])
    there = {path.relative_to(project).as_posix() for path in (project / "csrc").rglob("*") if path.is_file()}
    assert listed == there | {"torch-ext/torch_binding.cpp"}
    for kernel in prepared["kernel"].values():
        assert "-Dgapkern=TORCH_EXTENSION_NAME" in kernel.get("cxx-flags", kernel.get("cuda-flags"))
    sets = re.search(r"kIsaNames\[\] = \{([^}]+)\}.*?kIsaNames\[\] = \{([^}]+)\}", isa_header(), re.DOTALL)
    for isa in re.findall(r'"(\w+)"', sets[1] + sets[2]):
        assert (project / "csrc" / "perturb" / f"kernels_{isa}.cpp").exists(), isa


def isa_header():
    return (ROOT / "csrc" / "common" / "isa.h").read_text()


def test_python_files_name_neither_their_package_nor_its_operators(project):
    """As the hub asks: imports inside the package, and operators by the name that the build gives them."""
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    lazily = {"sklearn", "safetensors", "rich", "pyarrow"}  # asked for by what files and scikit-learn need
    for path in (project / "torch-ext").rglob("*.py"):
        text = path.read_text()
        assert "torch.ops.gapkern" not in text, path
        assert "gapkern::" not in text, path
        assert 'Library("' not in text, path
        tree = ast.parse(text)
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                at_import = node in tree.body
                assert name.split(".")[0] in (allowed if at_import else allowed | lazily), (path, name)


def test_a_build_is_loaded_from_a_folder_and_computes_the_same(project, tmp_path):
    """The library of this checkout, whose operators are named `gapkern`, in a process without gapkern."""
    lay_out(
        project, tmp_path, "_gapkern_cpu_here", f"torch.ops.load_library({str(LIBRARY)!r})\nops = torch.ops.gapkern"
    )
    code = """
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert kernel.__name__ == "_gapkern_cpu_here" and "gapkern" not in sys.modules
torch.save(use(kernel), sys.argv[2])
"""
    run(code, tmp_path, tmp_path / "found.pt")
    for found, expected in zip(torch.load(tmp_path / "found.pt"), ours(), strict=True):
        assert torch.equal(found, expected)


REGISTRATION = """#include <Python.h>
#define JOINED(A, B) A##B
#define INIT(NAME) JOINED(PyInit_, NAME)
#define TEXT_OF(NAME) #NAME
#define TEXT(NAME) TEXT_OF(NAME)
#define REGISTER_EXTENSION(NAME)                                                               \\
  PyMODINIT_FUNC INIT(NAME)() {                                                                \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(NAME), nullptr, 0, nullptr};      \\
    return PyModule_Create(&module);                                                           \\
  }
"""


def compiled(project, variant, name, work):
    """The library of a build for the CPU, by the sources and the flags that build.toml names."""
    build = tomllib.loads((project / "build.toml").read_text())
    (project / "torch-ext" / "registration.h").write_text(REGISTRATION)
    include = Path(torch.__file__).parent / "include"
    common = [os.environ.get("CXX", "c++"), "-fPIC", "-O0", "-w", f"-DTORCH_EXTENSION_NAME={name}", "-DCPU_KERNEL"]
    common += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x03090000", "-DNDEBUG"]
    common += [f"-isystem{include}", f"-I{sysconfig.get_path('include')}", f"-I{project / 'torch-ext'}"]
    jobs = [(source, ["-std=c++20"]) for source in build["torch"]["src"] if source.endswith(".cpp")]
    for kernel in build["kernel"].values():
        if kernel["backend"] == "cpu":
            flags = [*kernel["cxx-flags"], *(f"-I{project / each}" for each in kernel["include"])]
            jobs += [(source, flags) for source in kernel["src"] if source.endswith(".cpp")]

    def compile_one(job):
        source, flags = job
        # -O0 comes last: the vectors are written out, and compile three times faster than with -O1.
        command = [*common, *flags, "-O0", "-c", project / source, "-o", work / f"{source.replace('/', '_')}.o"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return command[-1]

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    libraries = [f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    arguments = ["-shared", "-o", variant / f"{name}.abi3.so", *objects, *libraries]
    done = subprocess.run([common[0], *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_compiled_build_lives_beside_gapkern(project, tmp_path):
    """Its operators have their own name, so that one process has both, and a second build of another version."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Python.h is not installed")
    name = "_gapkern_cpu_0123abc"
    variant = lay_out(project, tmp_path, name, f"from . import {name}\nops = torch.ops.{name}")
    compiled(project, variant, name, tmp_path)
    code = """
import gapkern
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert kernel.ClipLoss is not gapkern.ClipLoss
assert f"{kernel.__name__}::contrastive_lse" in torch._C._dispatch_get_all_op_names()
for found, expected in zip(use(kernel), use(gapkern), strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
"""
    run(code, tmp_path)

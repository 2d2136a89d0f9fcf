"""Hands the libraries that CMakeLists.txt builds to pip.

Environment: GAPKERN_CUDA=auto|on|off, GAPKERN_SANITIZE=address|thread, MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX, CUDACXX.
PyTorch is located, never imported: a build needs its headers and libraries, not its start-up. The libraries do not know
Python, so that a wheel serves every version of it; whatever the target folder, one build folder has the objects.
"""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77  # the first to read the SPDX licence in pyproject.toml


def fail(message):
    sys.exit(f"gapkern: {message}")


def torch_directory():
    """The folder of the PyTorch that the libraries are built against."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        fail(
            "PyTorch is not installed in the build environment; run `pip install torch` and then "
            "`pip install --no-build-isolation .`"
        )
    directory = Path(spec.origin).parent
    version = re.search(r"__version__ = '([^']+)'", (directory / "version.py").read_text())[1]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        fail(f"needs PyTorch >= {oldest}, found {version} in {directory}; run `pip install -U torch`")
    return directory


def find_tool(name):
    """A tool from its Python wheel if that is installed, otherwise from PATH."""
    beside_python = Path(sys.executable).parent / name
    spec = importlib.util.find_spec(name)
    if spec is not None and beside_python.exists():
        return str(beside_python)
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for candidate in (Path(folder) / "data" / "bin" / name, Path(folder).parent / "bin" / name):
                if candidate.exists():
                    return str(candidate)
    found = shutil.which(name)
    if found is None:
        fail(f"{name} is missing; run `pip install {name}`")
    return found


def check_compiler():
    wanted = os.environ.get("CXX")
    candidates = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        fail(
            f"no C++ compiler found (looked for {', '.join(candidates)}); install one "
            "(Debian/Ubuntu: `apt install g++`, macOS: `xcode-select --install`) or set CXX"
        )


def jobs():
    asked = os.environ.get("MAX_JOBS")
    if asked is None:
        return os.cpu_count() or 1
    if not asked.isdigit() or int(asked) < 1:
        fail(f"MAX_JOBS must be a positive integer, got {asked!r}")
    return int(asked)


def cuda_wish():
    wish = os.environ.get("GAPKERN_CUDA") or "auto"
    if wish.lower() not in ("auto", "on", "off"):
        fail(f"GAPKERN_CUDA must be auto, on or off, got {wish!r}")
    return wish.lower()


def sanitizer():
    wish = os.environ.get("GAPKERN_SANITIZE") or ""
    if wish not in ("", "address", "thread"):
        fail(f"GAPKERN_SANITIZE must be address or thread, got {wish!r}")
    return wish


def check_tensor_cores(log, build):
    """Fails where ptxas says that tensor core instructions wait for each other (C75xx), and drops those objects."""
    made = None
    found = {}
    for line in log.splitlines():
        made = re.search(r"Building CUDA object (\S+)", line) or made
        if re.search(r"\(C75\d\d\)", line) and made:
            found.setdefault(made[1], line)
    for name in found:
        (build / name).unlink(missing_ok=True)
    if found:
        name, line = next(iter(found.items()))
        fail(f"{name}: {line.strip()}; a kernel that waits for its tensor cores is refused")


class CMakeBuild(build_ext):
    """Builds every native library in one CMake run and installs it beside the Python files."""

    def run(self):
        cuda, parallel, sanitize = cuda_wish(), jobs(), sanitizer()
        check_compiler()
        (extension,) = self.extensions
        package = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = ROOT / "build" / "-".join(["cmake", sys.implementation.cache_tag, *filter(None, [sanitize])])
        cmake = find_tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGAPKERN_TORCH={torch_directory()}",
            f"-DGAPKERN_CUDA={cuda}",
            f"-DGAPKERN_SANITIZE={sanitize}",
            f"-DGAPKERN_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
        ]
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "build.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.prepare(build, configure)
            self.step(configure, build)
            self.step([cmake, "--build", str(build), "--parallel", str(parallel)], build)
            # What an earlier build with other switches installed must not outlive it.
            shutil.rmtree(package / "lib", ignore_errors=True)
            self.step([cmake, "--install", str(build), "--prefix", str(package)], build)

    def prepare(self, build, configure):
        """Starts the log, and drops CMake's cache where it was made for other tools or another place."""
        (build / "build.log").write_text("")
        tools = {name: os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDACXX", "CUDA_HOME", "CUDA_PATH")}
        signature = json.dumps([configure, tools])
        remembered = build / "configured-for.json"
        if not remembered.exists() or remembered.read_text() != signature:
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            remembered.write_text(signature)

    def step(self, command, build):
        """Runs one CMake step; its output goes to build.log. A known reason for a failure is one line."""
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with open(build / "build.log", "a") as log:
            log.write(result.stdout)
        check_tensor_cores(result.stdout, build)
        reason = re.search(r"gapkern: .*?(?=\n\n|\n--|\Z)", result.stdout, re.S) if result.returncode else None
        if reason and result.returncode:
            fail(" ".join(reason[0].split()).removeprefix("gapkern: "))
        for line in result.stdout.splitlines():
            if result.returncode or self.verbose > 1 or "gapkern:" in line:
                print(line.removeprefix("-- "), file=sys.stderr)
        if result.returncode:
            fail(f"the native build failed; the compiler's words are above and in {build / 'build.log'}")

    def get_outputs(self):
        package = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        return [str(path) for path in package.glob("lib/*")]


class AnyPython(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    fail(f"needs setuptools >= {OLDEST_SETUPTOOLS}, found {setuptools.__version__}; run `pip install -U setuptools`")
# The extension stands for all libraries: setuptools builds for a platform only where there is one.
setup(
    ext_modules=[Extension("gapkern.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython},
)

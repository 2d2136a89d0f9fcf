"""Prints what pyproject.toml asks for: to build and use the library, or of the extras that are named.

For pip, which installs an extra's packages only together with the library, and that builds it again.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())


def of_extras(names):
    for name in names:
        for requirement in PROJECT["project"]["optional-dependencies"][name]:
            own = re.fullmatch(r"gapkern\[(.+)\]", requirement)
            yield from of_extras(own[1].split(",")) if own else [requirement]


base = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
print("\n".join(dict.fromkeys(of_extras(sys.argv[1:]) if sys.argv[1:] else base)))

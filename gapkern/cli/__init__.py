"""`gapkern VERB`: one module per verb, each with `add(subparsers)` and `run(arguments)`."""

import argparse
import os
import sys
from typing import Any, NoReturn

from gapkern import layout
from gapkern.cli import answer, boundary

VERBS = (
    "demo",
    "embed",
    "gap",
    "shift",
    "project",
    "robust",
    "index",
    "search",
    "eval",
    "build",
    "reproduce",
    "doctor",
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.actions: dict[str, argparse.ArgumentParser] = {}

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Options of several words, with hyphens, or with underscores as open_clip and CLIP_benchmark spell them."""
        if names and names[0].startswith("--"):
            head = [f"--{name[2:].replace('_', '-')}" for name in names]
            names = tuple(dict.fromkeys([*head, *(f"--{name[2:].replace('-', '_')}" for name in names)]))
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A verb whose first word may be an action of its own: `actions` has their parsers."""
        action = self.actions.get(args[0]) if args else None
        return action.parse_known_args(args[1:], namespace) if action else super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"{self.prog}: {boundary.line(message)} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from importlib import import_module

    from gapkern._version import __version__

    whole = _Parser(prog="gapkern", description="Measure and close the modality gap of multi-modal embeddings.")
    whole.add_argument("--version", action="version", version=f"gapkern {__version__}")
    whole.add_argument("--debug", action="store_true", help="show where an error comes from")
    verbs = whole.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        module = import_module(f"gapkern.cli.{verb}")
        module.add(verbs)
    return whole


def _run(arguments: argparse.Namespace) -> int:
    """Runs one verb; then says on stderr what it chose where its arguments left a choice, and what it left aside."""
    with layout.notes() as said:
        status = arguments.run(arguments) or 0
    if os.environ.get("RANK", "0") == "0":
        for line in said:
            print(f"gapkern {arguments.verb}: {line}", file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; bad input is one line on stderr and exit status 2, an interrupt 130."""
    with boundary.streams():
        try:
            arguments = parser().parse_args(argv)
        except KeyboardInterrupt:
            return 130
        finally:
            boundary.flushed("gapkern")  # what --help has printed
        with answer.alone(getattr(arguments, "json", False)):
            return boundary.guarded(f"gapkern {arguments.verb}", lambda: _run(arguments), arguments.debug)

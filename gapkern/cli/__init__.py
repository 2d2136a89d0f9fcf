"""`gapkern VERB`: one module per verb, each with `add(subparsers)` and `run(arguments)`."""

import argparse

from gapkern.cli import boundary

VERBS = ("demo", "embed", "gap", "shift", "robust", "index", "search", "eval", "build", "reproduce", "doctor")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
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


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; bad input is one line on stderr and exit status 2, an interrupt 130."""
    with boundary.streams():
        try:
            arguments = parser().parse_args(argv)
        except KeyboardInterrupt:
            return 130
        finally:
            boundary.flushed("gapkern")  # what --help has printed
        return boundary.guarded(f"gapkern {arguments.verb}", lambda: arguments.run(arguments), arguments.debug)

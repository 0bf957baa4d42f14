"""Compiles the kernels ahead of the first start: python -m bucketserve.engine.native.build --help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bucketserve.engine.native.compiler import CompilerTooOldError, KernelBuildError
from bucketserve.engine.native.instruction_sets import ALL
from bucketserve.engine.native.library import build_into, load_library

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bucketserve.engine.native.build",
        description="Compiles the CPU kernels ahead of the first start. Without --into: for this processor, into the "
        "cache of this user; where that fails it says why and ends with status 0, since workers then use torch's "
        "operations. With --into, a failure is status 1.",
    )
    parser.add_argument("--into", type=Path, metavar="DIR", help="folder to fill; workers look in $BUCKETSERVE_CACHE")
    parser.add_argument(
        "--for", dest="names", nargs="+", choices=ALL, metavar="SET", help=f"with --into; default: {' '.join(ALL)}"
    )
    given = parser.parse_args(arguments)
    if given.names and given.into is None:
        parser.error("--for needs --into")
    try:
        if given.into is None:
            load_library(on_progress=print)
        else:
            for name in given.names or ALL:
                try:
                    print(build_into(given.into, ALL[name]))
                except CompilerTooOldError as error:
                    if given.names or name == [*ALL][-1]:
                        raise
                    print(f"without {name}: {error}", file=sys.stderr)
    except KernelBuildError as error:
        if given.into is not None:
            print(f"can't compile the CPU kernels: {error}", file=sys.stderr)
            return 1
        print(f"CPU workers will run without their kernels: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

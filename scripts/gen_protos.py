"""Generates the protobuf and gRPC code under libs/ from protos/; --check fails if it is not current."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUT = ROOT / "libs"


def generate(out: Path) -> list[Path]:
    """Writes the generated modules below out and returns their paths relative to it."""
    sources = sorted(path.relative_to(PROTOS) for path in PROTOS.rglob("*.proto"))
    include = Path(grpc_tools.__file__).parent / "_proto"
    folders = sorted({source.parent for source in sources})
    for folder in folders:
        (out / folder).mkdir(parents=True, exist_ok=True)
    args = [
        "protoc",
        f"-I{PROTOS}",
        f"-I{include}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main([*args, *map(str, sources)]) != 0:
        raise SystemExit("protoc failed; its message is above")
    for folder in folders:
        (out / folder / "__init__.py").write_text(
            f'"""Generated from protos/{folder} by scripts/gen_protos.py; never edited."""\n'
        )
    written = (path for folder in folders for path in (out / folder).iterdir() if path.suffix in {".py", ".pyi"})
    return sorted(path.relative_to(out) for path in written)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="fail if the committed code differs from what would be generated"
    )
    if not parser.parse_args().check:
        print(f"wrote {len(generate(OUT))} files below {OUT}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        stale = [
            str(path)
            for path in generate(fresh)
            if not (OUT / path).exists() or not filecmp.cmp(fresh / path, OUT / path, shallow=False)
        ]
    if stale:
        print("generated code is not current, run `make protos`:", *stale, sep="\n  ")
        return 1
    print("generated code is current")
    return 0


if __name__ == "__main__":
    sys.exit(main())

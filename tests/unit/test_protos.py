"""What generated code of other languages needs of every proto file."""

from __future__ import annotations

import importlib
from pathlib import Path

import bucketserve.v1

PACKAGE = "github.com/bucketserve/bucketserve/protos/bucketserve/v1;bucketservev1"


def test_every_file_names_its_go_package() -> None:
    names = [path.stem for path in Path(next(iter(bucketserve.v1.__path__))).glob("*_pb2.py")]
    assert len(names) >= 6
    for name in names:
        options = importlib.import_module(f"bucketserve.v1.{name}").DESCRIPTOR.GetOptions()
        assert options.go_package == PACKAGE, name

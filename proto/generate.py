"""Regenerates the Python code of the protobuf contract: `python proto/generate.py`, or `--check` to compare.

protoc comes from grpcio-tools, so its version is the one that constraints.txt pins. The code that it writes
refuses a protobuf runtime older than itself; pyproject.toml asks for a runtime that is new enough.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def sources() -> list[Path]:
    """Return every .proto file of the contract, relative to the root."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "orders").rglob("*.proto"))


def generate(target: Path) -> list[Path]:
    """Write the generated code below `target` and return the files' paths relative to it."""
    well_known = resources.files("grpc_tools") / "_proto"
    arguments = ["protoc", f"-I{ROOT}", f"-I{well_known}", f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main([*arguments, *(path.as_posix() for path in sources())]) != 0:
        raise SystemExit("protoc refused the contract; its message stands above.")
    return sorted(
        path.with_name(f"{path.stem}_pb2{suffix}") for path in sources() for suffix in (".py", ".pyi")
    )


def stale() -> list[Path]:
    """Return the committed files that differ from what the .proto files say."""
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory)
        return [
            path
            for path in generate(fresh)
            if not (ROOT / path).exists() or (ROOT / path).read_bytes() != (fresh / path).read_bytes()
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Regenerate the Python code of the protobuf contract.")
    parser.add_argument("--check", action="store_true", help="only compare, and fail when something differs")
    if parser.parse_args().check:
        different = stale()
        for path in different:
            print(f"proto/{path} does not match its .proto file: run `make proto`.", file=sys.stderr)
        return 1 if different else 0
    for path in generate(ROOT):
        print(f"proto/{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

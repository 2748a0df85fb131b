"""Sha256 digests of values and files."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 20


def fingerprint(parts: Iterable[Any]) -> str:
    """Returns the sha256 of a sequence of bytes, arrays and JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        is_text = isinstance(part, str | dict | list | None)
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() if is_text else part)
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """Returns the sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()

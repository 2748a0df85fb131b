"""The GPUs that a plan is made for, as ``--plan gpus=64,memory=80GB`` describes them."""

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from hf_clm.errors import RecipeError, did_you_mean

WHERE = "--plan"
EXAMPLE = "gpus=64,memory=80GB"
EXAMPLES = {
    **{"gpus": "64", "memory": "80GB", "node": "8", "bandwidth": "450GB", "network": "50GB"},
    **{"host": "25GB", "flops": "989T", "mfu": "0.4", "length": "4096"},
}
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
# 80GB or 80gb; not 400Gb, which may be bits
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(?:([KMGT]i|[KMGTP]?)B?|([kmgt]i|[kmgtp]?)b?)")
ROW = 4096  # tokens


@dataclass(frozen=True)
class Cluster:
    """GPUs and what is between them; the defaults are those of an H100 with InfiniBand.

    Args:
        gpus: of all boxes together.
        memory: bytes of each.
        node: GPUs of a box; 8, or all where there are fewer.
        bandwidth: bytes a second between the GPUs of a box, of each in one direction (NVLink 4).
        network: the same between boxes (InfiniBand NDR: 400 Gbit/s a GPU).
        host: the same between a GPU and the memory of its host (PCIe 4).
        flops: dense bfloat16 FLOP a second of a GPU on paper.
        mfu: the share of them that is assumed to be reached.
        length: tokens of a row, where no recipe says it; None: 4,096.
    """

    gpus: int
    memory: float
    node: int = 8
    bandwidth: float = 450e9
    network: float = 50e9
    host: float = 25e9
    flops: float = 989e12
    mfu: float = 0.4
    length: int | None = None

    @property
    def boxes(self) -> int:
        return self.gpus // self.node

    @property
    def row(self) -> int:
        """Tokens of a row."""
        return self.length or ROW

    @property
    def counted(self) -> str:
        """``64 GPUs``."""
        return f"{self.gpus} GPU{'' if self.gpus == 1 else 's'}"


def parse_cluster(text: str) -> Cluster:
    """Reads ``key=value`` pairs with commas between them. Raises RecipeError for what cannot be read."""
    known = [field.name for field in fields(Cluster)]
    values: dict[str, Any] = {}
    for pair in text.split(","):
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not sign:
            raise RecipeError("expected key=value", where=WHERE, got=repr(pair), fix=f"as in {EXAMPLE}")
        if key not in known:
            fix = f"one of {', '.join(known)}{did_you_mean(key, known)}"
            raise RecipeError("no such key", where=WHERE, got=repr(key), fix=fix)
        if key in values:
            raise RecipeError("a key is given twice", where=WHERE, got=repr(key))
        values[key] = _read(key, value)
    for key in ("gpus", "memory"):
        if key not in values:
            raise RecipeError(f"{key} is missing", where=WHERE, got=repr(text), fix=f"as in {EXAMPLE}")
    return _checked(Cluster(**{"node": min(8, values["gpus"]), **values}))


def _checked(cluster: Cluster) -> Cluster:
    if cluster.mfu > 1:
        raise RecipeError(
            "mfu is a share", where=WHERE, got=f"{cluster.mfu:g}", fix="0.4, or what bench says"
        )
    if cluster.memory < 1e9:
        fix = "with its unit: memory=80GB"
        raise RecipeError("memory is that of a GPU", where=WHERE, got=f"{cluster.memory:g} bytes", fix=fix)
    if cluster.gpus % cluster.node:
        what = f"{cluster.counted} cannot fill boxes of {cluster.node}"
        raise RecipeError(what, where=WHERE, fix="node=GPUs of a box")
    return cluster


def _read(key: str, text: str) -> float | int:
    """A number with or without a unit: 64, 0.4, 80GB, 80gb, 80GiB, 989T, 3e11."""
    match = NUMBER.fullmatch(text)
    whole = key in ("gpus", "node", "length")
    unit = (match[2] or match[3] or "").capitalize() if match else ""
    number = float(match[1]) * (UNITS | BINARY)[unit] if match else 0.0
    if not number or not math.isfinite(number) or (whole and number != int(number)):
        expected = "a whole number over 0" if whole else "a number over 0"
        fix = f"as in {key}={EXAMPLES[key]}"
        raise RecipeError(f"{key}: expected {expected}", where=WHERE, got=repr(text), fix=fix)
    return int(number) if whole else number

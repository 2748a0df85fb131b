"""The lines of a run as JSON, for systems that collect logs: ``HF_CLM_LOG=json hf-clm train RECIPE``.

    data      10 used; 709 tokens    --->  {"time": "2026-11-29T21:20:33.123+00:00", "level": "info",
                                            "topic": "data", "message": "10 used; 709 tokens"}

A log event of the training has its figures as keys too: ``"step": 40, "loss": 3.25``. An error is one object
on stderr, with ``"level": "error"`` and the ``exit_code``.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone

from hf_clm.errors import RecipeError

VARIABLE = "HF_CLM_LOG"
KINDS = ("text", "json")
TOPIC = re.compile(r"([a-z]+) {2,}(?=\S)")  # a run's lines begin with a word in a column of ten letters


def writes_json() -> bool:
    """Whether lines are printed as JSON. Raises RecipeError for a value that is neither text nor json."""
    kind = os.environ.get(VARIABLE) or "text"
    if kind not in KINDS:
        raise RecipeError(f"expected one of {', '.join(KINDS)}", where=VARIABLE, got=repr(kind))
    return kind == "json"


def to_json_lines(text: str, figures: Mapping[str, float]) -> Iterator[str]:
    """Yields a JSON object for each line of a text; a line without a topic has that of the line before."""
    topic = ""
    for line in text.splitlines():
        found = TOPIC.match(line)
        topic = found[1] if found else topic if line.startswith(" ") else ""
        message = line[found.end() :] if found else line.strip()
        yield to_json("info", message, {**({"topic": topic} if topic else {}), **figures})


def to_json(level: str, message: str, fields: Mapping[str, object]) -> str:
    """Returns one object; a figure that is not finite is null, which JSON can write."""
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }
    return json.dumps({"time": time, "level": level, "message": message, **finite}, ensure_ascii=False)

"""Numbers as people read them, and the names of those that an evaluation logs."""

import re

# Of an evaluation, but nothing that training changes.
ASIDE = re.compile(r"eval_(.*_)?(target_tokens|runtime|.*_per_second|model_preparation_time)")


def is_evaluated(key: str) -> bool:
    """Whether a key of a log event is a figure of an evaluation: ``eval_loss``, ``eval_news_chrf``, ..."""
    return key.startswith("eval_") and not ASIDE.fullmatch(key)


def evaluated_name(key: str) -> str:
    """``eval_news_token_accuracy`` -> ``"news accuracy"``."""
    return key.removeprefix("eval_").replace("token_accuracy", "accuracy").replace("_", " ")


def to_evaluated(key: str, value: float) -> str:
    """A figure of an evaluation: a share in percent, anything else in four digits."""
    return to_percent(value) if key.endswith(("accuracy", "exact_match")) else f"{value:.4g}"


def to_short(value: float) -> str:
    """``4.62416`` -> ``"4.624"``, ``6843.2`` -> ``"6,843"``, ``2500000`` -> ``"2.5M"``."""
    size = abs(value)
    if size < 1000:
        return f"{value:.4g}"
    if size < 1e6:
        return f"{value:,.0f}"
    unit, name = (1e6, "M") if size < 1e9 else (1e9, "B")
    return f"{value / unit:.4g}{name}"


def to_loss(value: float) -> str:
    """``4.62416`` -> ``"4.6242"``."""
    return f"{value:.4f}"


def to_count(value: float) -> str:
    """``29110`` -> ``"29,110"``."""
    return f"{value:,.0f}"


def to_percent(value: float) -> str:
    """``0.15195`` -> ``"15.2%"``, ``0.0025`` -> ``"0.25%"``."""
    return f"{100 * value:.3g}%"


def to_gigabytes(value: float) -> str:
    """``1234567890`` -> ``"1.23 GB"``."""
    return f"{value / 1e9:.3g} GB"


def to_duration(seconds: float) -> str:
    """``75`` -> ``"1m15s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

"""Numbers as people read them."""


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

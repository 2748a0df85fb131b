"""What is measured, as plain values between the processes, as a table and as JSON."""

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_clm.recipe.recipe import Recipe

WIDTH, INDENT = 100, " " * 10
MIB, MB = 2**20, 1e6
NOISE = 1.03  # less than 3 % faster is not faster
KEPT = "kept      nothing: the weights are thrown away, the data were prepared in a temporary folder"
COLUMNS = (
    "rows at once",
    "rows a step",
    "s a step",
    "tokens/s",
    "targets/s",
    "per second",
    "MFU",
    "peak MiB",
)


@dataclass(frozen=True)
class Task:
    """What a child measures: the start of a run, or the speed of its ``steps``. ``started``: time.time()."""

    recipe: Recipe
    steps: int
    started: float


@dataclass(frozen=True)
class Start:
    """The machine, the data, and the way to the first step.

    roofline            FLOP/s of a large matrix product, by its type; ``precision`` is that of the run
    nominal             FLOP/s by the maker of the device, None where it is not known
    micro_batch         rows at once, as the recipe has it
    fill                the share of the packed rows that is filled, None without packing
    text_bytes          of the examples
    collate_seconds     a batch, its rows at hand; rows_per_second: read and collated
    seconds             of a cold start, part by part
    """

    device: str
    precision: str
    roofline: dict[str, float]
    nominal: float | None
    micro_batch: int
    accumulation: int
    examples: int
    rows: int
    tokens: int
    target_tokens: int
    fill: float | None
    text_bytes: int
    collate_seconds: float
    rows_per_second: float
    seconds: dict[str, float]
    versions: dict[str, str]

    @property
    def prepare_bytes_per_second(self) -> float:
        return self.text_bytes / max(self.seconds["prepare"], 1e-9)


@dataclass(frozen=True)
class Trial:
    """The speed with so many rows at once, in the median of windows; ``failure``: why there is none.

    limit_bytes         memory that was free before, None where running out of it ends the child alone
    """

    rows: int
    accumulation: int
    failure: str = ""
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    target_tokens_per_second: float = 0.0
    flops_per_second: float = 0.0
    peak_bytes: int = 0
    limit_bytes: int | None = None

    def is_faster(self, other: "Trial") -> bool:
        """By more than the noise."""
        return self.tokens_per_second > NOISE * other.tokens_per_second


@dataclass(frozen=True)
class Bench:
    """All that was measured. ``trials``: the recipe's own first; ``stopped``: why no more rows were tried."""

    recipe: str
    start: Start
    trials: list[Trial] = field(default_factory=list)
    stopped: str = ""

    @property
    def fastest(self) -> Trial:
        """The recipe's own, where none is faster by more than the noise."""
        best = max(self.trials, key=lambda trial: trial.tokens_per_second)
        return best if best.is_faster(self.trials[0]) else self.trials[0]

    def mfu(self, trial: Trial) -> dict[str, float | None]:
        """Model FLOP utilisation: by the measured peak, and by the maker's."""
        nominal, speed = self.start.nominal, trial.flops_per_second
        measured = speed / self.start.roofline[self.start.precision]
        return {"measured": measured, "nominal": speed / nominal if nominal else None}

    def to_json(self) -> dict[str, Any]:
        """The same, in bytes, seconds and FLOP."""
        start = asdict(self.start)
        start["prepare_bytes_per_second"] = self.start.prepare_bytes_per_second
        trials = [asdict(trial) | {"mfu": self.mfu(trial)} for trial in self.trials]
        found = {"trials": trials, "fastest": self.fastest.rows, "stopped": self.stopped}
        return {"recipe": self.recipe, "start": start, **found}

    def to_lines(self) -> list[str]:
        """A table of the trials; ``start_lines`` are what they have in common."""
        trials = sorted(self.trials, key=lambda trial: trial.rows)
        cells = [COLUMNS, *(self._cells(trial) for trial in trials if not trial.failure)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(str.rjust, row, widths)) for row in cells]
        failed = [f"{trial.rows:>{widths[0]}}  {trial.failure}" for trial in trials if trial.failure]
        return ["", *table, *failed, "", f"fastest   {self._advice()}", f"          {self.stopped}", KEPT]

    def _advice(self) -> str:
        own, best = self.trials[0], self.fastest
        if best is own:
            return f"{own.rows} rows at once, as the recipe has it"
        rows = best.rows * best.accumulation
        changed = "" if rows == own.rows * own.accumulation else f"; a step of {rows} rows learns otherwise"
        gain = f" ({best.tokens_per_second / own.tokens_per_second:.2f}x)" if own.tokens_per_second else ""
        sizes = f"{best.rows} --gradient_accumulation_steps {best.accumulation}"
        return f"--per_device_train_batch_size {sizes}{gain}{changed}"

    def _cells(self, trial: Trial) -> tuple[str, ...]:
        shares = [f"{share:.1%}" for share in self.mfu(trial).values() if share is not None]
        return (
            str(trial.rows),
            str(trial.rows * trial.accumulation),
            f"{trial.step_seconds:.3f}",
            f"{trial.tokens_per_second:,.0f}",
            f"{trial.target_tokens_per_second:,.0f}",
            to_flops(trial.flops_per_second),
            " / ".join(shares),
            f"{trial.peak_bytes / MIB:,.0f}",
        )


def start_lines(start: Start) -> list[str]:
    """The machine, the data, their way into the model, and the seconds to the first step."""
    peaks = [f"{to_flops(speed)}/s in {kind}" for kind, speed in start.roofline.items()]
    peaks += [f"{to_flops(start.nominal)}/s by its maker"] if start.nominal else []
    filled = "not packed" if start.fill is None else f"{start.fill:.1%} full"
    parts = [f"{name} {seconds:.2f}" for name, seconds in start.seconds.items()]
    total = sum(start.seconds.values())
    return [
        f"device    {start.device}",
        f"peak      {', '.join(peaks)}",
        f"data      {start.examples:,} examples, {start.tokens:,} tokens ({start.target_tokens:,} targets) "
        f"in {start.rows:,} rows, {filled}",
        f"input     prepare {start.prepare_bytes_per_second / MB:.2f} MB/s, "
        f"collate {start.collate_seconds * 1e6:.0f} us a batch, {start.rows_per_second:,.0f} rows/s",
        *textwrap.wrap(f"start     {total:.1f} s: {', '.join(parts)}", WIDTH, subsequent_indent=INDENT),
    ]


def to_flops(count: float) -> str:
    """``4.1e11`` -> ``"410 GFLOP"``, ``1.5e9`` -> ``"1.5 GFLOP"``, ``9.9e14`` -> ``"990 TFLOP"``."""
    size, name = (1e12, "TFLOP") if count >= 1e12 else (1e9, "GFLOP")
    return f"{count / size:.3g} {name}"

"""``hf-clm doctor``: everything that can be found out about a run without making a step."""

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hf_clm.data.batch.collators import build_collator
from hf_clm.data.prepared.cache import read_splits
from hf_clm.data.prepared.sets import load_early
from hf_clm.data.read.faults import check_data
from hf_clm.data.read.plain_template import settle_render
from hf_clm.doctor.checks import run_checks
from hf_clm.doctor.facts import Check, Facts, Problem, build_facts, longest_rows, to_micro_step, to_problem
from hf_clm.doctor.memory import MemoryEstimate, measure_memory
from hf_clm.errors import ExitCode, UserError
from hf_clm.model.build import build_model, build_model_config, build_tokenizer_aside
from hf_clm.model.load import takes_targets
from hf_clm.model.loss import use_target_loss, why_not
from hf_clm.recipe.recipe import Recipe
from hf_clm.training.arguments import training_arguments

MIB = 2**20
PARTS = ("weights", "optimizer", "gradients", "activations", "logits", "micro_step", "evaluation", "total")


@dataclass(frozen=True)
class Diagnosis:
    """What was found; ``measured``: bytes of a micro-step over weights and optimizer, if it was run."""

    checks: dict[str, Check]
    estimate: MemoryEstimate | None = None
    measured: int | None = None
    seconds: float = 0.0

    @property
    def problems(self) -> list[Problem]:
        """Those that stop a run."""
        found = [check for check in self.checks.values() if isinstance(check, Problem)]
        return [problem for problem in found if not problem.is_warning]

    @property
    def exit_code(self) -> ExitCode:
        return self.problems[0].error.exit_code if self.problems else ExitCode.DONE

    def to_lines(self) -> list[str]:
        """A table: OK, WARN or PROBLEM, what was looked at, what was found; a fix on a line of its own."""
        width = max(map(len, self.checks), default=0)
        lines = []
        for name, check in self.checks.items():
            lines.append(f"{_grade(check):<8} {name:<{width}}  {check.what}")
            if isinstance(check, Problem):
                place = f"{check.where}; " if check.where else ""
                lines.append(f"{'':<8} {'':<{width}}  {place}fix: {check.fix}" if check.fix else place)
        counts = [_grade(check) for check in self.checks.values()]
        problems, warnings = counts.count("PROBLEM"), counts.count("WARN")
        summary = f"{len(counts)} checks, {problems} problems, {warnings} warnings, {self.seconds:.1f} s"
        return [*lines, *self._memory_lines(), summary]

    def to_json(self) -> dict[str, Any]:
        """The same as values for JSON; memory in bytes."""
        return {
            "checks": [{"name": name, **_check_json(check)} for name, check in self.checks.items()],
            "memory_bytes": asdict(self.estimate) | {"total": self.estimate.total} if self.estimate else None,
            "measured_micro_step_bytes": self.measured,
            "exit_code": int(self.exit_code),
            "seconds": round(self.seconds, 3),
        }

    def _memory_lines(self) -> list[str]:
        if self.estimate is None:
            return []
        sizes = [f"{part.replace('_', ' ')} {getattr(self.estimate, part) / MIB:,.0f}" for part in PARTS]
        lines = [
            f"memory (MiB, estimated{', roughly' if self.estimate.is_rough else ''}): {', '.join(sizes)}"
        ]
        if self.measured is not None:
            ratio = self.estimate.micro_step / max(1, self.measured)
            lines.append(
                f"memory (MiB, measured): micro step {self.measured / MIB:,.0f}; estimate {ratio:.0%} of it"
            )
        return lines


def diagnose(recipe: Recipe, *, measure: bool) -> Diagnosis:
    """Reads the data, the tokenizer and the configuration as ``train`` does, and checks; writes nothing.

    Args:
        measure: also loads the model and runs its longest batch forward and backward.

    A part that cannot be read is a problem like the others; what depends on it is not checked.
    """
    started = time.monotonic()
    stage = _Stage()
    try:
        facts = _collect(recipe, stage, loads_model=measure)
        stage.name = "memory"
        if measure and facts.estimate is not None:
            facts = replace(facts, measured=_measure(facts))
    except UserError as error:
        return Diagnosis({stage.name: to_problem(error)}, seconds=time.monotonic() - started)
    checks = run_checks(facts)
    return Diagnosis(checks, facts.estimate, facts.measured, time.monotonic() - started)


@dataclass
class _Stage:
    """How far ``_collect`` has come."""

    name: str = field(default="arguments")


def _collect(recipe: Recipe, stage: _Stage, *, loads_model: bool) -> Facts:
    arguments = training_arguments(recipe)
    stage.name = "data"
    check_data(recipe)
    loaded = load_early(recipe, arguments.seed)
    stage.name = "tokenizer"
    tokenizer = build_tokenizer_aside(recipe, loaded, arguments=arguments)
    recipe = settle_render(recipe, tokenizer)
    stage.name = "model"
    config = build_model_config(recipe, tokenizer)
    stage.name = "data"
    splits = read_splits(recipe, tokenizer, seed=arguments.seed)
    facts = build_facts(recipe, arguments, tokenizer=tokenizer, config=config, splits=splits)
    if loads_model and facts.estimate is not None:
        stage.name = "model"
        model = build_model(recipe, tokenizer, config=config, arguments=arguments)
        facts = replace(facts, model=model)
    return facts


def _measure(facts: Facts) -> int | None:
    model, arguments, dataset = facts.model, facts.arguments, facts.train.dataset
    assert model is not None and facts.estimate is not None
    step = to_micro_step(facts)
    rows = [dataset[number] for number in longest_rows(dataset, arguments.train_batch_size)]
    batch = build_collator(facts.recipe, facts.tokenizer, with_targets=takes_targets(model))(rows)
    torch.nn.Module.to(model, arguments.device)
    if not why_not(model):
        use_target_loss(model)
    if step.checkpointing:
        model.activation_checkpointing_enable()
    measured = measure_memory(model, batch, autocast=step.autocast)
    held = facts.estimate.gradients if step.accumulates else 0  # of the micro-step before
    return measured + held if measured is not None else None


def _grade(check: Check) -> str:
    if isinstance(check, Problem):
        return "WARN" if check.is_warning else "PROBLEM"
    return "OK"


def _check_json(check: Check) -> dict[str, Any]:
    if not isinstance(check, Problem):
        return {"grade": "ok", "what": check.what}
    code = int(check.error.exit_code)
    found = {"what": check.what, "where": check.where, "fix": check.fix, "exit_code": code}
    return {"grade": _grade(check).lower(), **found}

"""``hf-clm doctor``: everything that can be checked about a run without taking a step."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_clm.data.prepared.cache import read_splits
from hf_clm.data.prepared.sets import load_early
from hf_clm.data.read.faults import check_data
from hf_clm.data.read.plain_template import settle_render
from hf_clm.data.split import build_collator
from hf_clm.doctor.checks import Check, Problem, run_checks, to_problem
from hf_clm.doctor.facts import Facts, build_facts, longest_rows, to_micro_step
from hf_clm.doctor.memory import MemoryEstimate, measure_memory
from hf_clm.doctor.micro_batch import settle_batch
from hf_clm.errors import ExitCode, UserError
from hf_clm.model.build import build_model, build_model_config, build_tokenizer_aside
from hf_clm.model.load import takes_targets
from hf_clm.model.loss import use_target_loss, why_not
from hf_clm.recipe.recipe import Recipe
from hf_clm.training.arguments import training_arguments

MIB = 2**20
MEMORY_PARTS = (
    *("weights", "optimizer", "gradients", "copies", "activations", "logits"),
    *("micro_step", "evaluation", "total"),
)


@dataclass(frozen=True)
class Diagnosis:
    """The results of the doctor. ``measured``: bytes of a micro-step besides weights and optimizer."""

    checks: dict[str, Check]
    estimate: MemoryEstimate | None = None
    measured: int | None = None
    seconds: float = 0.0

    @property
    def problems(self) -> list[Problem]:
        """The problems that stop a run, without warnings."""
        problems = [check for check in self.checks.values() if isinstance(check, Problem)]
        return [problem for problem in problems if not problem.is_warning]

    @property
    def exit_code(self) -> ExitCode:
        return self.problems[0].error.exit_code if self.problems else ExitCode.DONE

    def to_lines(self) -> list[str]:
        """Formats a table of grade, check and finding, with each fix on a separate line; then the memory."""
        width = max(map(len, self.checks), default=0)
        lines = []
        for name, check in self.checks.items():
            lines.append(f"{_grade(check):<8} {name:<{width}}  {check.what}")
            if isinstance(check, Problem):
                advice = "; ".join(filter(None, (check.where, check.fix and f"fix: {check.fix}")))
                lines.append(f"{'':<8} {'':<{width}}  {advice}")
        counts = [_grade(check) for check in self.checks.values()]
        problems, warnings = counts.count("PROBLEM"), counts.count("WARN")
        summary = f"{len(counts)} checks, {problems} problems, {warnings} warnings, {self.seconds:.1f} s"
        return [*lines, *self._memory_lines(), summary]

    def to_json(self) -> dict[str, Any]:
        """Returns the same content for JSON, with memory in bytes."""
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
        sizes = [
            f"{part.replace('_', ' ')} {getattr(self.estimate, part) / MIB:,.0f}" for part in MEMORY_PARTS
        ]
        kind = "rough estimate" if self.estimate.is_rough else "estimated"
        lines = [f"memory (MiB, {kind}): {', '.join(sizes)}"]
        if self.measured is not None:
            ratio = self.estimate.micro_step / max(1, self.measured)
            measured = f"micro step {self.measured / MIB:,.0f}; the estimate is {ratio:.0%} of it"
            lines.append(f"memory (MiB, measured): {measured}")
        return lines


def diagnose(recipe: Recipe, *, measure: bool) -> Diagnosis:
    """Loads data, tokenizer and configuration as ``train`` does, and runs all checks, without writing files.

    If a part cannot be loaded, that is the only problem reported.

    Args:
        measure: also load the model, and run forward and backward on its longest batch.
    """
    started, part = time.monotonic(), "arguments"
    try:
        arguments = training_arguments(recipe)
        part = "data"
        check_data(recipe)
        loaded = load_early(recipe, arguments.seed)
        part = "tokenizer"
        tokenizer = build_tokenizer_aside(recipe, loaded, arguments=arguments)
        recipe = settle_render(recipe, tokenizer)
        part = "model"
        config = build_model_config(recipe, tokenizer)
        part = "data"
        splits = read_splits(recipe, tokenizer, seed=arguments.seed)
        facts = build_facts(recipe, arguments, tokenizer=tokenizer, config=config, splits=splits)
        facts, _ = settle_batch(facts, kept={})
        if measure and facts.estimate is not None:
            part = "model"
            model = build_model(recipe, tokenizer, config=config, arguments=arguments)
            part = "memory"
            facts = replace(facts, measured=_measure(model, facts))
    except UserError as error:
        return Diagnosis({part: to_problem(error)}, seconds=time.monotonic() - started)
    return Diagnosis(run_checks(facts), facts.estimate, facts.measured, time.monotonic() - started)


def _measure(model: PreTrainedModel, facts: Facts) -> int | None:
    arguments, dataset, step = facts.arguments, facts.train.dataset, to_micro_step(facts)
    assert facts.estimate is not None
    rows = [dataset[number] for number in longest_rows(dataset, arguments.train_batch_size)]
    batch = build_collator(facts.recipe, facts.tokenizer, with_targets=takes_targets(model))(rows)
    torch.nn.Module.to(model, arguments.device)
    if not why_not(model):
        use_target_loss(model)
    if step.checkpointing:
        model.activation_checkpointing_enable()
    measured = measure_memory(model, batch, autocast=step.autocast)
    accumulated = facts.estimate.gradients if step.accumulates else 0  # from the previous micro-step
    return measured + accumulated if measured is not None else None


def _grade(check: Check) -> str:
    if isinstance(check, Problem):
        return "WARN" if check.is_warning else "PROBLEM"
    return "OK"


def _check_json(check: Check) -> dict[str, Any]:
    grade = {"grade": _grade(check).lower(), "what": check.what}
    if not isinstance(check, Problem):
        return grade
    return {**grade, "where": check.where, "fix": check.fix, "exit_code": int(check.error.exit_code)}

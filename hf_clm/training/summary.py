"""Summarises a run: the lines at its start and end, run.json, and the content of SEALED.json."""

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.prepared.sets import NO_EXAMPLE
from hf_clm.data.prepared.store import HEAD
from hf_clm.data.split import Split, note_lines
from hf_clm.evaluation.metrics import unigram_entropy
from hf_clm.hashing import fingerprint
from hf_clm.machine import bf16_instructions, describe_machine, version_of
from hf_clm.model.adapters import describe_quantized
from hf_clm.model.load import is_adapted, without_adapters
from hf_clm.recipe.recipe import Recipe, describe_recipe
from hf_clm.recipe.sections import EVAL, TRAIN
from hf_clm.recipe.text import leaves
from hf_clm.run_folder import METRICS, Counts, Proof, RunRecord, StreamTotals, is_evaluated, metric_of
from hf_clm.schema import Chat
from hf_clm.template import Template
from hf_clm.training.arguments import count_steps, resolve, rows_per_step
from hf_clm.training.groups import optimizer_lines

# Keys of a model's config that a run sets itself, or compares elsewhere.
NO_ARCHITECTURE = re.compile(r"_.*|.*_token_id|transformers_version|(torch_)?dtype|use_cache|architectures")
SHOWN_LETTERS = 160  # of an answer, in the lines at the end of a run
SAMPLED_VALUES = 64  # per weight
PACKAGES = ("hf_clm", "torch", "transformers", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run before its first step."""

    recipe: Recipe
    arguments: TrainingArguments
    model: PreTrainedModel
    splits: Mapping[str, Split]
    unigram_entropy: float
    render: str = "auto"
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def train(self) -> Split:
        """The training data."""
        return self.splits["train"]

    @property
    def evaluations(self) -> dict[str, Split]:
        """The evaluation sets, ``eval`` or ``eval_NAME``; empty if training rows are evaluated instead."""
        return {name: split for name, split in self.splits.items() if name != TRAIN}

    @property
    def format(self) -> str:
        """The format of the training data, in which plain text prompts are rendered."""
        source = self.recipe.data.train[0]
        return "template" if source.template else source.format or sorted(self.train.examples.formats)[0]

    @property
    def has_turns(self) -> bool:
        """Whether prompts are rendered with the chat template of the tokenizer."""
        head = self.train.examples.examples[:HEAD]
        return isinstance(next((example for example in head if example != NO_EXAMPLE), None), Chat)

    @property
    def template(self) -> Template | None:
        """The template of the first source, in which plain text prompts are rendered, or None."""
        return self.recipe.data.train[0].template

    @property
    def rows_per_step(self) -> int:
        return rows_per_step(self.arguments)

    @property
    def steps(self) -> int:
        return count_steps(self.arguments, len(self.train.dataset))

    @property
    def tokens_per_step(self) -> float:
        """The mean number of real tokens in a step."""
        return self.train.tokens / len(self.train.dataset) * min(self.rows_per_step, len(self.train.dataset))

    @property
    def trained_parameters(self) -> int:
        """The number of trainable parameters, of the model or its adapters."""
        return self.model.num_parameters(only_trainable=True)

    @property
    def precision(self) -> str:
        autocast = "bfloat16" if self.arguments.bf16 else "float16" if self.arguments.fp16 else None
        weights = str(self.model.dtype).removeprefix("torch.")
        return f"{weights} weights, {autocast} autocast" if autocast else weights

    @property
    def device(self) -> str:
        """The device with its precision, and how to change a precision that was chosen by default."""
        kind, note = self.arguments.device.type, ""
        if kind == "cpu":
            kind = f"cpu with {torch.get_num_threads()} threads"
            if self.arguments.bf16 and "bf16" not in self.recipe.train:
                note = f" (this CPU has {bf16_instructions()}; disable with --bf16 false)"
        return f"{self.arguments.world_size} x {kind}, {self.precision}{note}"

    def to_record(self, status: str, *, proof: Mapping[str, Any]) -> RunRecord:
        """Returns the record for run.json. ``origins`` does not include keys with their default value."""
        origins = {key: origin for key, _, origin in describe_recipe(self.recipe) if origin != "default"}
        evaluations = list(self.evaluations.values())
        record = RunRecord(
            status=status,
            started=self.started,
            recipe=self.recipe.file,
            origins=origins,
            stage=self.recipe.stage,
            max_length=self.recipe.data.max_length,
            special_tokens_in_text=self.recipe.data.special_tokens_in_text,
            reasoning=self.recipe.data.reasoning,
            format=self.format,
            render=self.render,
            has_turns=self.has_turns,
            template=self.template,
            model=self.recipe.model.name_or_path or self.model.config.model_type,
            from_scratch=self.recipe.model.init == "scratch",
            parameters=self.model.num_parameters(),
            trained_parameters=self.trained_parameters,
            has_adapters=is_adapted(self.model),
            train=count([self.train]),
            evaluation=count(evaluations) if evaluations else None,
            unigram_entropy=self.unigram_entropy,
            steps=self.steps,
            rows_per_step=self.rows_per_step,
            processes=self.arguments.world_size,
            device=str(self.arguments.device),
            precision=self.precision,
            attention=self.model.config._attn_implementation,  # may differ from the recipe's
            max_grad_norm=self.arguments.max_grad_norm,
            versions=versions(),
            proof=Proof.model_validate(proof),
        )
        if not self.evaluations.keys() <= {EVAL}:
            counts = {name.removeprefix(f"{EVAL}_"): count([one]) for name, one in self.evaluations.items()}
            record = record.updated(evaluations=counts)
        if self.recipe.lora and self.recipe.lora.quantize:
            record = record.updated(quantized=describe_quantized(self.model))
        return record.updated(mixing=self.train.mix.to_json()) if self.train.mix else record


def add_outcome(
    record: RunRecord,
    history: Sequence[Mapping[str, Any]],
    final: Mapping[str, float],
    *,
    seconds: float,
    steps: int,
    speed: Mapping[str, float],
) -> RunRecord:
    """Returns the record of a finished run.

    Args:
        history: the log events.
        final: the last evaluation, of an earlier model with ``load_best_model_at_end``.
        speed: tokens_per_second and mfu.
    """
    tokens = [entry["tokens_seen"] for entry in history if "tokens_seen" in entry]
    first = {key: next((entry[key] for entry in history if key in entry), final[key]) for key in final}
    evaluated = {key: (first[key], final[key]) for key in filter(is_evaluated, final)}
    return record.updated(
        steps_done=steps,
        seconds=seconds,
        tokens_seen=tokens[-1] if tokens else 0,
        loss_before=first["eval_loss"],
        loss_after=final["eval_loss"],
        token_accuracy_before=first["eval_token_accuracy"],
        token_accuracy_after=final["eval_token_accuracy"],
        evaluated=evaluated,
        **speed,
    )


def seal_facts(
    facts: RunFacts, tokenizer: PreTrainedTokenizerFast, *, proof: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of SEALED.json: the recipe, other facts that affect training, and the versions."""
    certificate = proof.get("train", {}).get("certificate", {})
    return {
        "recipe": resolve(facts.recipe, facts.arguments).model_dump(),
        "facts": {
            "data": f"{len(facts.train.dataset):,} rows, sha256 {certificate.get('content_hash')}",
            "tokenizer": fingerprint([tokenizer.backend_tokenizer.to_str()]),
            "template": fingerprint([tokenizer.chat_template]),
            "global_batch": facts.rows_per_step,
            "processes": facts.arguments.world_size,
            **({"base_weights": _sample_frozen(facts.model)} if is_adapted(facts.model) else {}),
        },
        "architecture": dict(leaves(_architecture(facts.model), "architecture")),
        "versions": versions(),
        "machine": describe_machine(facts.arguments.device),
    }


def guessing_loss(split: Split) -> float:
    """Returns the entropy of an epoch's labels in nats per token: the loss of a unigram model."""
    return unigram_entropy(split.drawn_label_counts)


def start_lines(facts: RunFacts) -> list[str]:
    """Returns the lines that a run prints before its first step."""
    arguments, model, train = facts.arguments, facts.model, facts.train
    origin = "random weights" if facts.recipe.model.init == "scratch" else facts.recipe.model.name_or_path
    kind = type(without_adapters(model)).__name__
    lines = [
        f"recipe    {facts.recipe.file or 'without a file'}, stage {facts.recipe.stage}",
        f"model     {kind}, {origin}, {model.num_parameters():,} parameters",
        f"data      {'first of the stream: ' if facts.recipe.data.streaming else ''}{_describe(train)}",
    ]
    if train.mix:
        first, *others = train.mix.to_lines()
        lines += [f"mixing    {first}", *(f"{'':<10}{line}" for line in others)]
    if facts.recipe.lora:
        trained = facts.trained_parameters
        lines.append(f"lora      {trained:,} trainable parameters, {trained / model.num_parameters():.2%}")
    if facts.recipe.optimizer:
        lines += optimizer_lines(model, facts.recipe.optimizer)
    for name, split in facts.evaluations.items():
        lines.append(f"{name:<9} {_describe(split)}")
    if facts.recipe.stage == "pretrain":
        lines.append(f"unigram   {facts.unigram_entropy:.3f} nats per token: the loss of a unigram model")
    lines += [
        f"step      {facts.rows_per_step} rows, about {facts.tokens_per_step:,.0f} tokens",
        f"steps     {facts.steps:,}",
        f"device    {facts.device}",
        f"output    {arguments.output_dir}",
    ]
    lines += note_lines(facts.splits)
    if len(train.examples.formats) > 1:
        lines.append(f"note      several formats: plain text prompts are rendered as {facts.format}")
    return lines


def end_lines(facts: RunFacts, record: RunRecord, *, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines that a run prints when it is done. ``samples`` is the content of samples.jsonl."""
    output, saved = facts.arguments.output_dir, "adapters" if facts.recipe.lora else "model"
    amounts = {"step": record.steps_done, "tokens_seen": record.tokens_seen, "mfu": record.mfu}
    amounts |= {"seconds": record.seconds, "tokens_per_second": record.tokens_per_second}
    texts = {key: METRICS[key].form(value or 0) for key, value in amounts.items()}
    changes = {}
    for key, (before, after) in record.evaluated.items():
        if metric := metric_of(key):
            changes[metric.short] = f"{metric.form(before)} -> {metric.form(after)}"
    loss, accuracy = changes.pop("eval loss"), changes.pop("eval accuracy")
    lines = [
        f"done      {texts['step']} steps in {texts['seconds']}, {texts['tokens_seen']} tokens, "
        f"{texts['tokens_per_second']} tokens/s ({texts['mfu']} MFU)",
        f"loss      {loss} on {record.evaluated_on}",
        f"accuracy  {accuracy} of the target tokens",
        *(f"{'':<10}{name} {change}" for name, change in changes.items()),
    ]
    if facts.recipe.stage == "pretrain":
        lines.append(f"unigram   {facts.unigram_entropy:.4f}")
    if record.stream:
        lines.append(stream_line(record.stream))
    return [
        *lines,
        *sample_lines(samples),
        f"written   {output}: the {saved}, recipe.yaml, run.json, metrics.jsonl, report.html, README.md",
        f'next      hf-clm generate {output} --prompt "..."',
    ]


def sample_lines(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns each sample prompt with its first and its last answer; nothing if all are of the same step."""
    before = {sample["prompt"]: sample["text"] for sample in reversed(samples)}
    after = {sample["prompt"]: sample["text"] for sample in samples}
    if len({sample["step"] for sample in samples}) < 2:
        return []
    groups = ((("asked", prompt), ("before", before[prompt]), ("after", after[prompt])) for prompt in after)
    return [f"{name:<10}{_to_one_line(text)}" for group in groups for name, text in group]


def _to_one_line(text: str) -> str:
    line = " ".join(text.split()) or "(empty)"
    return line if len(line) <= SHOWN_LETTERS else f"{line[:SHOWN_LETTERS].rstrip()} ..."


def stream_line(totals: StreamTotals) -> str:
    """Describes how many documents of a stream were read, and their fates."""
    fates = ", ".join(f"{count:,} {fate}" for fate, count in totals.fates.items())
    least, most = totals.passes
    passes = f"{least}" if least == most else f"{least} to {most}"
    workers = f"by {totals.shards} workers, " if totals.shards > 1 else ""
    return f"stream    {totals.documents:,} documents read ({fates}), {workers}complete passes: {passes}"


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that affect training; None if not installed."""
    cuda = {"cuda": str(torch.version.cuda)} if torch.version.cuda else {}
    return {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}, **cuda}


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the entries of a model's config that affect what it computes."""
    config = without_adapters(model).config.to_diff_dict()
    return {key: value for key, value in config.items() if not NO_ARCHITECTURE.fullmatch(key)}


def _sample_frozen(model: PreTrainedModel) -> str:
    """Returns the sha256 of some values of each frozen weight, as checkpoints do not contain them."""
    parts = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            flat = weight.detach().flatten()
            some = flat[:: max(1, flat.numel() // SAMPLED_VALUES)]
            parts += [name, some.float().cpu().contiguous().numpy()]
    return fingerprint(parts)


def _describe(split: Split) -> str:
    is_packed = isinstance(split.dataset, PackedDataset)
    packed = f" in {len(split.dataset):,} packed rows" if is_packed else ""
    fates = ", ".join(f"{count:,} {fate}" for fate, count in sorted(split.fates.items()))
    return f"{fates}; {split.tokens:,} tokens ({split.target_tokens:,} targets){packed}"


def count(splits: Sequence[Split]) -> Counts:
    """Returns the counts of a set, or the sums over several sets."""
    fills = [split.dataset.fill for split in splits if isinstance(split.dataset, PackedDataset)]
    return Counts(
        files=[file for split in splits for file in split.examples.report.files],
        input_rows=sum(len(split.examples) for split in splits),
        fates=dict(sum((split.fates for split in splits), Counter())),
        rows=sum(len(split.dataset) for split in splits),
        tokens=sum(split.tokens for split in splits),
        target_tokens=sum(split.target_tokens for split in splits),
        **({"packing_fill": fills[0]} if len(splits) == len(fills) == 1 else {}),
    )

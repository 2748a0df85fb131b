"""Checks before the first step. Each returns Ok, or a Problem: what is wrong, where, and how to fix it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.doctor.facts import Facts
from hf_clm.errors import DataError, EnvironmentFault, ModelError, RecipeError, UserError
from hf_clm.model.attention import NAME as PACKED
from hf_clm.model.attention import why_not_varlen
from hf_clm.model.build import weights_dtype
from hf_clm.model.load import attention_dropout
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.tokenizer import control_tokens, max_token_id, unique_ids, unknown_id

SAMPLE_EXAMPLES = 200  # examples to examine where all would take too long
FOREIGN_TOKENIZER = 0.1  # new rows relative to a pretrained model's; above it, the tokenizer does not match
UNUSED_ROWS = 0.1  # fraction of the embeddings
MIN_BYTES_PER_TOKEN = 1.5  # UTF-8; about 4 is usual for English and Chinese, 1 means a token per byte
UNKNOWN_TOKENS = 0.01
OVERLONG_ROWS = 0.05
TOKEN_LIKE = re.compile(r"<\|?\w+\|?>|\[[A-Z]+\]")  # <sep>, <|eot|>, [SEP]
FILL = 0.75  # best fit never leaves two rows half empty, so it always fills more than 0.5
ESTIMATE_ERROR = 1.15  # the estimate is within 15 % of the measured memory
GIB = 2**30


@dataclass(frozen=True)
class Ok:
    """A check without a problem; ``what`` is the finding."""

    what: str


@dataclass(frozen=True)
class Problem:
    """A problem, which stops the run with ``error`` unless it is a warning."""

    what: str
    where: str = ""
    fix: str = ""
    error: type[UserError] = RecipeError
    is_warning: bool = False

    def to_error(self) -> UserError:
        """Returns the error to raise."""
        return self.error(self.what, where=self.where, fix=self.fix)


Check = Ok | Problem


def run_checks(facts: Facts) -> dict[str, Check]:
    """Runs all checks; returns the results by name, without those that do not apply."""
    results = {name: _run_check(check, facts) for name, check in DOCTOR_CHECKS.items()}
    return {name: result for name, result in results.items() if result is not None}


def check_before_training(facts: Facts) -> list[str]:
    """Returns the warnings as lines. Raises the first problem that is not a warning."""
    problems = [check for check in run_checks(facts).values() if isinstance(check, Problem)]
    for problem in problems:
        if not problem.is_warning:
            raise problem.to_error()
    return [str(problem.to_error()) for problem in problems]


def check_steps(facts: Facts) -> Check:
    """Checks that there is a step: if drop_last drops the only batch, the Trainer reports success anyway."""
    rows, batch = len(facts.train.dataset), facts.arguments.train_batch_size * facts.arguments.world_size
    if facts.steps == 0:
        what = f"{rows:,} rows do not fill a batch of {batch} (all processes), and drop_last is on"
        return Problem(what, "data.train", "lower train.per_device_train_batch_size", DataError)
    return Ok(f"{facts.steps:,} steps with {facts.rows_per_step} rows each")


def check_global_batch(facts: Facts) -> Check:
    """Checks that a step takes fewer rows than there are."""
    rows = len(facts.train.dataset)
    if facts.recipe.data.streaming:
        return Ok(f"{facts.rows_per_step} rows of a stream; only its first documents are checked")
    if facts.rows_per_step > rows:
        what = f"a step takes {facts.rows_per_step} rows, but there are only {rows}: one step per epoch"
        fix = "lower train.per_device_train_batch_size or train.gradient_accumulation_steps"
        return Problem(what, "train.per_device_train_batch_size", fix, is_warning=True)
    return Ok(f"{facts.rows_per_step} rows, {rows / facts.rows_per_step:,.1f} batches per epoch")


def check_warmup(facts: Facts) -> Check:
    """Checks that the warm-up ends before the run does."""
    warmup = facts.arguments.get_warmup_steps(facts.steps)
    if warmup > facts.steps:
        what = f"the warm-up of {warmup:,} steps is longer than the run of {facts.steps:,}"
        return Problem(what, "train.warmup_steps", "lower it, or set a fraction such as 0.03")
    return Ok(f"{warmup:,} of {facts.steps:,} steps")


def check_saving(facts: Facts) -> Check:
    """Checks that checkpoints are saved, and at steps that are evaluated."""
    every, limit = _every(facts, "save"), facts.arguments.save_total_limit
    if every is None:
        return Ok(f"strategy {_strategy(facts, 'save')}")
    if every > facts.steps:
        what = f"a checkpoint every {every:,} steps, but the run has {facts.steps:,}: none before the end"
        return Problem(what, "train.save_steps", "lower it", is_warning=True)
    eval_every = _every(facts, "eval")
    if eval_every and every % eval_every:
        what = f"not all checkpoints (every {every:,} steps) are evaluated (every {eval_every:,} steps)"
        return Problem(what, "train.save_steps", "make it a multiple of train.eval_steps", is_warning=True)
    return Ok(f"every {every:,} steps, {f'the last {limit}' if limit else 'all'} kept")


def check_evaluation(facts: Facts) -> Check:
    """Checks that evaluation takes place."""
    every = _every(facts, "eval")
    if every is not None and every > facts.steps:
        what = f"an evaluation every {every:,} steps, but the run has {facts.steps:,}"
        return Problem(what, "train.eval_steps", "lower it", is_warning=True)
    return Ok(f"every {every:,} steps" if every else f"strategy {_strategy(facts, 'eval')}")


def check_logging(facts: Facts) -> Check:
    """Checks that the loss is logged."""
    every, strategy = _every(facts, "logging"), _strategy(facts, "logging")
    is_silent = every is not None and every > facts.steps and not facts.arguments.logging_first_step
    if strategy == "no" or is_silent:
        what = "the loss is never logged"
        return Problem(what, "train.logging_steps", f"set it to {max(1, facts.steps // 20)}", is_warning=True)
    return Ok(f"every {every:,} steps" if every else f"strategy {strategy}")


def check_vocabulary(facts: Facts) -> Check:
    """Checks that the tokenizer matches the model, and that most embedding rows are used."""
    ids, rows = max_token_id(facts.tokenizer) + 1, facts.config.vocab_size
    new, unused = max(0, ids - rows), max(0, rows - ids)
    if facts.recipe.model.init == "pretrained" and new > FOREIGN_TOKENIZER * rows:
        what = f"the tokenizer ({ids:,} ids) does not match the pretrained model ({rows:,} embedding rows)"
        fix = "remove it to use the tokenizer of the model"
        return Problem(what, "tokenizer.name_or_path", fix, ModelError)
    if unused > UNUSED_ROWS * rows:
        what = f"{unused:,} of {rows:,} embedding rows have no token"
        fix = "leave vocab_size out of model.config, or use the tokenizer of the model"
        return Problem(what, "model.config", fix, ModelError, is_warning=True)
    return Ok(f"{ids:,} ids, {max(rows, ids):,} rows" + (f" ({new:,} new)" if new else ""))


def check_bytes_per_token(facts: Facts) -> Check | None:
    """Checks how much text a token encodes: close to one byte, rows are long and learning is slow."""
    if unknown_id(facts.tokenizer) is not None:
        return Ok("one character per token")
    examples = facts.train.examples.examples[:SAMPLE_EXAMPLES]
    texts = list(
        islice((text for example in examples for text in example.texts if text), 5 * SAMPLE_EXAMPLES)
    )
    if not texts:
        return None
    tokens = sum(map(len, facts.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    rate = sum(len(text.encode("utf-8", "replace")) for text in texts) / max(1, tokens)
    if rate < MIN_BYTES_PER_TOKEN:
        what = f"{rate:.1f} bytes of text per token; 3 to 4 are usual"
        fix = "use a tokenizer for the language of the text, or train one (tokenizer.train)"
        return Problem(what, "tokenizer", fix, ModelError, is_warning=True)
    return Ok(f"{rate:.1f} bytes of text per token")


def check_unknown_tokens(facts: Facts) -> Check | None:
    """Checks that the tokenizer can represent the text: unknown tokens lose it."""
    unknown = facts.tokenizer.unk_token_id
    if not isinstance(unknown, int) or unknown == facts.tokenizer.eos_token_id:  # GPT-2 uses its end token
        return None
    counts, tokens = facts.train.id_counts, max(1, int(facts.train.id_counts.sum()))
    share = int(counts[unknown : unknown + 1].sum()) / tokens
    if share == 0:
        return Ok("none")
    what = (
        f"{share:.2%} of the tokens are {facts.tokenizer.unk_token}: the tokenizer cannot represent the text"
    )
    fix = "use another tokenizer (byte-level BPE can represent any text)"
    return Problem(what, "tokenizer", fix, ModelError, is_warning=share <= UNKNOWN_TOKENS)


def check_template_tokens(facts: Facts) -> Check | None:
    """Checks that control tokens in a template, such as ``<sep>``, are tokens of the tokenizer."""
    sources = [*facts.recipe.data.train, *facts.recipe.data.eval]
    texts = [text for source in sources if source.template for text in source.template.own_texts]
    marks = sorted({token for text in texts for token in TOKEN_LIKE.findall(text)})
    missing = [token for token in marks if token not in control_tokens(facts.tokenizer)]
    if missing:
        what = f"{', '.join(missing)} in the template is plain text for this tokenizer"
        fix = f"set tokenizer.control_tokens: [{', '.join(missing)}], unless plain text is intended"
        return Problem(what, "data.train", fix, is_warning=True)
    return Ok(f"{', '.join(marks) or 'none'}") if texts else None


def check_stop_is_learned(facts: Facts) -> Check:
    """Checks that some labels are stop tokens: otherwise, the model never learns to stop."""
    counts, stops = facts.train.label_counts, stop_token_ids(facts.tokenizer)
    count = sum(int(counts[stop : stop + 1].sum()) for stop in unique_ids(stops))
    if count == 0:
        names = ", ".join(map(str, facts.tokenizer.convert_ids_to_tokens(stops)))
        has_user_labels = facts.train.examples.formats <= {"tokenized", "segments"}
        fix = "add one at the end of each target" if has_user_labels else "raise data.max_length"
        what = f"no label is a stop token ({names})"
        return Problem(what, "data.train", fix, DataError, is_warning=has_user_labels)
    return Ok(f"{count:,} stop tokens among the labels")


def check_overlong(facts: Facts) -> Check:
    """Checks how many rows data.max_length truncates or drops; splitting does not count."""
    fates = facts.train.fates
    lost = sum(count for fate, count in fates.items() if fate.startswith("cut") or "max_length" in fate)
    if lost > OVERLONG_ROWS * fates.total():
        what = f"{lost:,} of {fates.total():,} rows are over max_length, and truncated or dropped"
        return Problem(what, "data.max_length", "raise it", DataError, is_warning=True)
    return Ok(f"{lost:,} of {fates.total():,} rows over max_length")


def check_fill(facts: Facts) -> Check | None:
    """Checks that packed rows are full; they are not if documents are a little over half of max_length."""
    packed = facts.train.dataset
    if not isinstance(packed, PackedDataset) or len(packed) < 2:
        return None
    if packed.fill < FILL:
        what = f"the packed rows are {packed.fill:.0%} full"
        key = "tokens_per_batch" if facts.recipe.data.tokens_per_batch else "max_length"
        fix = "set it to a multiple of the typical length"
        return Problem(what, f"data.{key}", fix, is_warning=True)
    return Ok(f"{packed.fill:.0%} full")


def check_memory(facts: Facts) -> Check | None:
    """Checks that weights, gradients, optimizer, activations and logits fit into the device's free memory."""
    estimate, measured, free = facts.estimate, facts.measured, facts.machine.free_memory
    if estimate is None:
        return None
    needed = estimate.at_rest + max(estimate.evaluation, measured or estimate.micro_step)
    what = f"{_gib(needed)} needed, {_gib(free)} free"
    if needed > (free if measured else free / ESTIMATE_ERROR):
        is_sure = bool(measured) or (needed > free * ESTIMATE_ERROR and not estimate.is_rough)
        fix = (
            "lower train.per_device_train_batch_size (and _eval_), data.max_length, "
            "or set train.activation_checkpointing: true"
        )
        return Problem(what, "memory", fix, EnvironmentFault, is_warning=not is_sure)
    return Ok(what)


def check_disk(facts: Facts) -> Check | None:
    """Checks that the checkpoints (one more than save_total_limit) and the final model fit on the disk."""
    estimate, arguments = facts.estimate, facts.arguments
    if estimate is None:
        return None
    saves = _saves(facts)
    count = min(saves, arguments.save_total_limit + 1 if arguments.save_total_limit else saves)
    checkpoint = estimate.weights + (0 if arguments.save_only_model else estimate.optimizer)
    needed, free = checkpoint * count + estimate.weights, facts.machine.free_disk
    what = f"{_gib(needed)} needed for {count} checkpoints and the model, {_gib(free)} free"
    if needed > free:
        fix = "lower train.save_total_limit, set train.save_only_model, or free up space"
        return Problem(what, str(arguments.output_dir), fix, EnvironmentFault)
    return Ok(what)


def check_threads(facts: Facts) -> Check:
    """Checks OMP_NUM_THREADS: too many threads slow each other down; on a CPU, too few leave cores idle."""
    machine = facts.machine
    if machine.threads is None:
        return Ok(f"{machine.cores} cores, OMP_NUM_THREADS is not set")
    used = machine.threads * machine.processes
    is_idle = facts.arguments.device.type == "cpu" and used <= machine.cores // 2
    what = f"{machine.processes} x {machine.threads} threads on {machine.cores} physical cores"
    if used > machine.cores or is_idle:
        fix = f"set OMP_NUM_THREADS={max(1, machine.cores // machine.processes)}"
        return Problem(what, "OMP_NUM_THREADS", fix, EnvironmentFault, is_warning=True)
    return Ok(what)


def check_dtype(facts: Facts) -> Check:
    """Checks that the device supports the dtypes, and that the optimizer can train in them."""
    arguments, dtype = facts.arguments, facts.recipe.model.dtype
    device, where = facts.machine.device, "train.bf16"
    if dtype == "float16":
        what = "float16 weights cannot be trained because gradients overflow"
        return Problem(what, "model.dtype", "set it to float32, with train.fp16: true", RecipeError)
    if arguments.fp16 and device == "cpu":
        fix = "set train.bf16: true, or neither"
        return Problem("float16 autocast requires a GPU", "train.fp16", fix, RecipeError)
    if (arguments.bf16 or dtype == "bfloat16") and not facts.machine.has_bf16:
        what = f"this {device} has no native bfloat16, which makes it slower than float32"
        return Problem(what, where, "remove it, or set train.fp16 on a GPU", is_warning=True)
    if device == "cuda" and not facts.machine.has_bf16 and not arguments.fp16:
        what = "this GPU has no native bfloat16, and is several times slower in float32 than in float16"
        return Problem(what, "train.fp16", "set it to true", is_warning=True)
    if dtype == "bfloat16" and facts.recipe.lora is None:  # adapters are float32
        what = "bfloat16 weights lose small updates"
        return Problem(what, "model.dtype", "set it to float32, with train.bf16: true", is_warning=True)
    autocast = ", bfloat16 autocast" if arguments.bf16 else ", float16 autocast" if arguments.fp16 else ""
    return Ok(f"{weights_dtype(facts.recipe, arguments)} weights{autocast} on {device}")


def check_attention_kernel(facts: Facts) -> Check | None:
    """Checks whether only its attention dropout keeps a run from the fused kernel for packed rows."""
    machine, arguments, section = facts.machine, facts.arguments, facts.recipe.model
    if machine.device == "cpu" or section.attention != PACKED or facts.estimate is None:
        return None
    text = facts.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    name, dropout = attention_dropout(facts.config)
    dtype = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else section.dtype
    why_not = partial(
        why_not_varlen, machine.device, machine.capability, dtype=getattr(torch, dtype), width=width
    )
    if reason := why_not(dropout=0.0):
        return Ok(f"one masked call of SDPA: {reason}")
    if reason := why_not(dropout=dropout):
        what = f"{reason}, so {name} {dropout:g} costs a masked call with several times the scores"
        key = f"model.config.{name}" if section.config else "model.attention_dropout"
        return Problem(what, key, f"unless it is needed, set it to 0 (--{key} 0)", is_warning=True)
    return Ok("the fused kernel for packed rows")


def check_gpus(facts: Facts) -> Check:
    """Checks that all GPUs are used."""
    machine, arguments = facts.machine, facts.arguments
    used = machine.processes if arguments.device.type == "cuda" else 0
    if used < machine.gpus:
        launch = "start it with accelerate launch --multi_gpu -m hf_clm train RECIPE"
        fix = launch if used else "remove train.use_cpu"
        what = f"{used} of {machine.gpus} GPUs used"
        return Problem(what, "GPUs", fix, EnvironmentFault, is_warning=True)
    return Ok(f"{used} of {machine.gpus} GPUs used" if machine.gpus else "none available")


DOCTOR_CHECKS: dict[str, Callable[[Facts], Check | None]] = {
    "steps": check_steps,
    "batch": check_global_batch,
    "warm-up": check_warmup,
    "saving": check_saving,
    "evaluation": check_evaluation,
    "logging": check_logging,
    "vocabulary": check_vocabulary,
    "bytes per token": check_bytes_per_token,
    "unknown tokens": check_unknown_tokens,
    "template tokens": check_template_tokens,
    "learned stops": check_stop_is_learned,
    "overlong rows": check_overlong,
    "packing": check_fill,
    "memory": check_memory,
    "disk": check_disk,
    "threads": check_threads,
    "precision": check_dtype,
    "attention": check_attention_kernel,
    "GPUs": check_gpus,
}


def to_problem(error: UserError) -> Problem:
    """Converts an error to a problem."""
    what = f"{error.what}; got {error.got}" if error.got else error.what
    return Problem(what, error.where, error.fix, type(error))


def _run_check(check: Callable[[Facts], Check | None], facts: Facts) -> Check | None:
    """Runs a check; an error that it raises becomes a problem."""
    try:
        return check(facts)
    except UserError as error:
        return to_problem(error)


def _every(facts: Facts, kind: str) -> int | None:
    """Returns the number of steps between two events; None if the strategy is not ``steps``."""
    steps = getattr(facts.arguments, f"{kind}_steps")
    if _strategy(facts, kind) != "steps" or not steps:
        return None
    return math.ceil(steps * facts.steps) if steps < 1 else int(steps)


def _strategy(facts: Facts, kind: str) -> str:
    return str(getattr(facts.arguments, f"{kind}_strategy").value)


def _saves(facts: Facts) -> int:
    """Returns the number of checkpoints that the run saves."""
    match _strategy(facts, "save"):
        case "epoch":
            return max(1, math.ceil(facts.arguments.num_train_epochs))
        case "steps":
            return math.ceil(facts.steps / max(1, _every(facts, "save") or 1))
        case strategy:
            return 1 if strategy == "best" else 0


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f} GiB"

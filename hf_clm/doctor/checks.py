"""The checks before the first step: each says Ok, or what is wrong, where, and how to fix it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.doctor.facts import Facts
from hf_clm.errors import DataError, EnvironmentFault, ModelError, RecipeError, UserError
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.tokenizer import control_tokens, max_token_id, unique_ids, unknown_id

SAMPLE = 200  # examples that are looked at, where all would take too long
FOREIGN_TOKENIZER = 0.1  # new rows, as a share of a pretrained model's: more are another model's tokenizer
UNUSED_ROWS = 0.1  # of the embeddings
BYTES_PER_TOKEN = 1.5  # of UTF-8; 4 is usual in English and in Chinese, 1 is spelling byte by byte
UNKNOWN_TOKENS = 0.01
OVERLONG_ROWS = 0.05
TOKEN_LIKE = re.compile(r"<\|?\w+\|?>|\[[A-Z]+\]")  # <sep>, <|eot|>, [SEP]
FILL = 0.75  # best fit cannot leave two rows half empty: under 0.5 it never gets
ESTIMATE_ERROR = 1.15  # the estimate is good to 15 %: over this much of what is free it cannot fit
GIB = 2**30


@dataclass(frozen=True)
class Ok:
    """Nothing to fix; ``what`` was found."""

    what: str


@dataclass(frozen=True)
class Problem:
    """Stops the run as an ``error``; a warning does not."""

    what: str
    where: str = ""
    fix: str = ""
    error: type[UserError] = RecipeError
    is_warning: bool = False

    def to_error(self) -> UserError:
        """The error that the run raises."""
        return self.error(self.what, where=self.where, fix=self.fix)


Check = Ok | Problem


def run_checks(facts: Facts) -> dict[str, Check]:
    """Name -> what was found, in the order of CHECKS; without those that do not apply."""
    found = {name: _look(check, facts) for name, check in CHECKS.items()}
    return {name: check for name, check in found.items() if check is not None}


def check_before_training(facts: Facts) -> list[str]:
    """The lines of the warnings. Raises the first problem that is more than a warning."""
    problems = [check for check in run_checks(facts).values() if isinstance(check, Problem)]
    for problem in problems:
        if not problem.is_warning:
            raise problem.to_error()
    return [str(problem.to_error()) for problem in problems]


def check_steps(facts: Facts) -> Check:
    """The Trainer makes no step, and reports success, where drop_last drops the only batch."""
    rows, batch = len(facts.train.dataset), facts.arguments.train_batch_size * facts.arguments.world_size
    if facts.steps == 0:
        what = f"{rows:,} rows do not fill a batch of {batch} (per device x processes), and drop_last is on"
        return Problem(what, "data.train", "lower train.per_device_train_batch_size", DataError)
    return Ok(f"{facts.steps:,} steps of {facts.rows_per_step} rows")


def check_global_batch(facts: Facts) -> Check:
    """A batch larger than the data is one step an epoch."""
    rows = len(facts.train.dataset)
    if facts.recipe.data.streaming:
        return Ok(f"{facts.rows_per_step} rows of a stream; the checks are of its first documents")
    if facts.rows_per_step > rows:
        what = f"a step takes {facts.rows_per_step} rows, and there are {rows}: one step an epoch"
        fix = "lower train.per_device_train_batch_size or train.gradient_accumulation_steps"
        return Problem(what, "train.per_device_train_batch_size", fix, is_warning=True)
    return Ok(f"{facts.rows_per_step} rows, {rows / facts.rows_per_step:,.1f} times in the data")


def check_warmup(facts: Facts) -> Check:
    """The learning rate must reach its value before the run ends."""
    warmup = facts.arguments.get_warmup_steps(facts.steps)
    if warmup > facts.steps:
        what = f"the warm-up of {warmup:,} steps is longer than the run of {facts.steps:,}"
        return Problem(what, "train.warmup_steps", "lower it, or give a share such as 0.03")
    return Ok(f"{warmup:,} of {facts.steps:,} steps")


def check_saving(facts: Facts) -> Check:
    """Checkpoints that never come, or at steps that are not evaluated."""
    every, limit = _every(facts, "save"), facts.arguments.save_total_limit
    if every is None:
        return Ok(f"strategy {_strategy(facts, 'save')}")
    if every > facts.steps:
        what = f"a checkpoint every {every:,} steps, and the run has {facts.steps:,}: none before the end"
        return Problem(what, "train.save_steps", "lower it", is_warning=True)
    evaluated = _every(facts, "eval")
    if evaluated and every % evaluated:
        what = f"checkpoints every {every:,} steps are not all evaluated (every {evaluated:,})"
        return Problem(what, "train.save_steps", "make it a multiple of train.eval_steps", is_warning=True)
    return Ok(f"every {every:,} steps, {f'the last {limit}' if limit else 'all'} kept")


def check_evaluation(facts: Facts) -> Check:
    """An evaluation that never comes."""
    every = _every(facts, "eval")
    if every is not None and every > facts.steps:
        what = f"an evaluation every {every:,} steps, and the run has {facts.steps:,}"
        return Problem(what, "train.eval_steps", "lower it", is_warning=True)
    return Ok(f"every {every:,} steps" if every else f"strategy {_strategy(facts, 'eval')}")


def check_logging(facts: Facts) -> Check:
    """A run that never logs its loss."""
    every, strategy = _every(facts, "logging"), _strategy(facts, "logging")
    is_silent = every is not None and every > facts.steps and not facts.arguments.logging_first_step
    if strategy == "no" or is_silent:
        what = "the loss is never logged"
        return Problem(what, "train.logging_steps", f"set it to {max(1, facts.steps // 20)}", is_warning=True)
    return Ok(f"every {every:,} steps" if every else f"strategy {strategy}")


def check_vocabulary(facts: Facts) -> Check:
    """A tokenizer of another model, or rows that belong to no token."""
    ids, rows = max_token_id(facts.tokenizer) + 1, facts.config.vocab_size
    new, unused = max(0, ids - rows), max(0, rows - ids)
    if facts.recipe.model.init == "pretrained" and new > FOREIGN_TOKENIZER * rows:
        what = (
            f"the tokenizer has {ids:,} ids, the pretrained model {rows:,} rows: it belongs to another model"
        )
        return Problem(what, "tokenizer.name_or_path", "leave it out: the model's own is used", ModelError)
    if unused > UNUSED_ROWS * rows:
        what = f"{unused:,} of {rows:,} rows of the embeddings belong to no token"
        fix = "leave vocab_size out of model.config, or use the tokenizer of the model"
        return Problem(what, "model.config", fix, ModelError, is_warning=True)
    return Ok(f"{ids:,} ids, {max(rows, ids):,} rows" + (f" ({new:,} new)" if new else ""))


def check_bytes_per_token(facts: Facts) -> Check | None:
    """A tokenizer that spells the text byte by byte makes rows long and learning slow."""
    if unknown_id(facts.tokenizer) is not None:
        return Ok("a character in a token")
    examples = facts.train.examples.examples[:SAMPLE]
    texts = list(islice((text for example in examples for text in example.texts if text), 5 * SAMPLE))
    if not texts:
        return None
    tokens = sum(map(len, facts.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    rate = sum(len(text.encode("utf-8", "replace")) for text in texts) / max(1, tokens)
    if rate < BYTES_PER_TOKEN:
        what = f"a token holds {rate:.1f} bytes of the text; 3 to 4 are usual"
        fix = "use a tokenizer of the text's language, or train one: tokenizer.train"
        return Problem(what, "tokenizer", fix, ModelError, is_warning=True)
    return Ok(f"{rate:.1f} bytes of the text in a token")


def check_unknown_tokens(facts: Facts) -> Check | None:
    """Text that the tokenizer cannot spell is lost."""
    unknown = facts.tokenizer.unk_token_id
    if not isinstance(unknown, int) or unknown == facts.tokenizer.eos_token_id:  # GPT-2 uses its end token
        return None
    counts, tokens = facts.train.id_counts, max(1, int(facts.train.id_counts.sum()))
    share = int(counts[unknown : unknown + 1].sum()) / tokens
    if share == 0:
        return Ok("none")
    what = f"{share:.2%} of the tokens are {facts.tokenizer.unk_token}: the tokenizer cannot spell the text"
    fix = "use a tokenizer that can (byte-level BPE spells everything)"
    return Problem(what, "tokenizer", fix, ModelError, is_warning=share <= UNKNOWN_TOKENS)


def check_template_tokens(facts: Facts) -> Check | None:
    """To a tokenizer without it, the ``<sep>`` of a template is five letters."""
    sources = [*facts.recipe.data.train, *facts.recipe.data.eval]
    texts = [text for source in sources if source.template for text in source.template.own_texts]
    spelled = sorted({token for text in texts for token in TOKEN_LIKE.findall(text)})
    missing = [token for token in spelled if token not in control_tokens(facts.tokenizer)]
    if missing:
        what = f"the template writes {', '.join(missing)}, which is plain text to this tokenizer"
        fix = f"tokenizer.control_tokens: [{', '.join(missing)}], unless plain text is meant"
        return Problem(what, "data.train", fix, is_warning=True)
    return Ok(f"{', '.join(spelled) or 'none'}") if texts else None


def check_stop_is_learned(facts: Facts) -> Check:
    """A model that never sees a learned stop token never stops."""
    counts, stops = facts.train.label_counts, stop_token_ids(facts.tokenizer)
    count = sum(int(counts[stop : stop + 1].sum()) for stop in unique_ids(stops))
    if count == 0:
        names = ", ".join(map(str, facts.tokenizer.convert_ids_to_tokens(stops)))
        is_own = facts.train.examples.formats <= {"tokenized", "segments"}  # labels of the user
        fix = "put one at the end of each target" if is_own else "raise data.max_length"
        return Problem(f"no label is a stop token ({names})", "data.train", fix, DataError, is_warning=is_own)
    return Ok(f"{count:,} stop tokens among the labels")


def check_overlong(facts: Facts) -> Check:
    """Rows that lose a part by data.max_length; a split row loses nothing."""
    fates = facts.train.fates
    lost = sum(count for fate, count in fates.items() if fate.startswith("cut") or "max_length" in fate)
    if lost > OVERLONG_ROWS * fates.total():
        what = f"{lost:,} of {fates.total():,} rows are over max_length and lose a part"
        return Problem(what, "data.max_length", "raise it", DataError, is_warning=True)
    return Ok(f"{lost:,} of {fates.total():,} rows over max_length")


def check_fill(facts: Facts) -> Check | None:
    """Packed rows that are not full: most documents are a little over half of max_length."""
    packed = facts.train.dataset
    if not isinstance(packed, PackedDataset) or len(packed) < 2:
        return None
    if packed.fill < FILL:
        what = f"the packed rows are {packed.fill:.0%} full"
        key = "tokens_per_batch" if facts.recipe.data.tokens_per_batch else "max_length"
        return Problem(what, f"data.{key}", "set it to a multiple of the usual length", is_warning=True)
    return Ok(f"{packed.fill:.0%} full")


def check_memory(facts: Facts) -> Check | None:
    """Weights, gradients, optimizer, activations and logits against what is free on the device."""
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
    """The most checkpoints that exist at one time, one more than are kept, and the final model."""
    estimate, arguments = facts.estimate, facts.arguments
    if estimate is None:
        return None
    saves = _saves(facts)
    kept = min(saves, arguments.save_total_limit + 1 if arguments.save_total_limit else saves)
    checkpoint = estimate.weights + (0 if arguments.save_only_model else estimate.optimizer)
    needed, free = checkpoint * kept + estimate.weights, facts.machine.free_disk
    what = f"{kept} checkpoints and the model take {_gib(needed)}, {_gib(free)} are free"
    if needed > free:
        fix = "lower train.save_total_limit, set train.save_only_model, or free some space"
        return Problem(what, str(arguments.output_dir), fix, EnvironmentFault)
    return Ok(what)


def check_threads(facts: Facts) -> Check:
    """More threads than cores slow each other down; fewer leave cores idle on a CPU."""
    machine = facts.machine
    if machine.threads is None:
        return Ok(f"{machine.cores} cores, OMP_NUM_THREADS is not set")
    used = machine.threads * machine.processes
    is_idle = facts.arguments.device.type == "cpu" and used <= machine.cores // 2
    what = f"{machine.processes} x {machine.threads} threads on {machine.cores} physical cores"
    if used > machine.cores or is_idle:
        fix = f"OMP_NUM_THREADS={max(1, machine.cores // machine.processes)}"
        return Problem(what, "OMP_NUM_THREADS", fix, EnvironmentFault, is_warning=True)
    return Ok(what)


def check_dtype(facts: Facts) -> Check:
    """A number format that the device has, and that the optimizer can train in."""
    arguments, dtype = facts.arguments, facts.recipe.model.dtype
    device, where = arguments.device.type, "train.bf16"
    if dtype == "float16":
        what = "weights in float16 cannot be trained: their gradients overflow"
        return Problem(what, "model.dtype", "float32, with train.fp16: true", RecipeError)
    if arguments.fp16 and device == "cpu":
        return Problem(
            "float16 autocast needs a GPU", "train.fp16", "train.bf16: true, or neither", RecipeError
        )
    if (arguments.bf16 or dtype == "bfloat16") and not facts.machine.has_bf16:
        what = f"this {device} has no bfloat16 of its own: slower than float32"
        return Problem(what, where, "leave it out, or set train.fp16 on a GPU", is_warning=True)
    if dtype == "bfloat16":
        what = "weights in bfloat16 lose small updates"
        return Problem(what, "model.dtype", "float32, with train.bf16: true", is_warning=True)
    autocast = ", bfloat16 autocast" if arguments.bf16 else ", float16 autocast" if arguments.fp16 else ""
    return Ok(f"{dtype} weights{autocast} on {device}")


def check_gpus(facts: Facts) -> Check:
    """GPUs that are idle."""
    machine, arguments = facts.machine, facts.arguments
    used = machine.processes if arguments.device.type == "cuda" else 0
    if used < machine.gpus:
        fix = "accelerate launch --multi_gpu -m hf_clm train RECIPE" if used else "leave out train.use_cpu"
        what = f"{used} of {machine.gpus} GPUs used"
        return Problem(what, "GPUs", fix, EnvironmentFault, is_warning=True)
    return Ok(f"{used} of {machine.gpus} GPUs used" if machine.gpus else "none here")


CHECKS: dict[str, Callable[[Facts], Check | None]] = {
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
    "GPUs": check_gpus,
}


def to_problem(error: UserError) -> Problem:
    """An error that a part of the program raised, as a finding."""
    what = f"{error.what}; got {error.got}" if error.got else error.what
    return Problem(what, error.where, error.fix, type(error))


def _look(check: Callable[[Facts], Check | None], facts: Facts) -> Check | None:
    """What the check finds; an error that a part it calls raises is a problem too."""
    try:
        return check(facts)
    except UserError as error:
        return to_problem(error)


def _every(facts: Facts, kind: str) -> int | None:
    """The steps between two events; None where they do not go by steps."""
    steps = getattr(facts.arguments, f"{kind}_steps")
    if _strategy(facts, kind) != "steps" or not steps:
        return None
    return math.ceil(steps * facts.steps) if steps < 1 else int(steps)


def _strategy(facts: Facts, kind: str) -> str:
    return str(getattr(facts.arguments, f"{kind}_strategy").value)


def _saves(facts: Facts) -> int:
    """The checkpoints that the run would write."""
    match _strategy(facts, "save"):
        case "epoch":
            return max(1, math.ceil(facts.arguments.num_train_epochs))
        case "steps":
            return math.ceil(facts.steps / max(1, _every(facts, "save") or 1))
        case strategy:
            return 1 if strategy == "best" else 0


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f} GiB"

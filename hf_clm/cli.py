"""The command line: each subcommand loads a recipe or a run, calls one function, and prints."""

import argparse
import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, get_args

from hf_clm.errors import ExitCode, RecipeError, UserError, did_you_mean
from hf_clm.schema import Format

ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def main(words: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code. What a user can fix is one line on stderr."""
    words = list(sys.argv[1:] if words is None else words)
    shows_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return ExitCode.DONE
    try:
        if words[0] not in COMMANDS:
            fix = f"one of {', '.join(COMMANDS)}{did_you_mean(words[0], COMMANDS)}"
            raise RecipeError("no such command", got=repr(words[0]), fix=fix)
        return COMMANDS[words[0]](words[1:]) or ExitCode.DONE
    except UserError as error:
        return _fail(str(error), error.exit_code, shows_traceback=shows_traceback)
    except KeyboardInterrupt:
        return _fail("interrupted", ExitCode.INTERRUPTED, shows_traceback=shows_traceback)
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}", ExitCode.ENVIRONMENT, shows_traceback=shows_traceback)


def help_text() -> str:
    """What ``hf-clm --help`` prints."""
    lines = [f"  hf-clm {name:<16} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "hf-clm: pretraining and fine-tuning of causal language models on the Hugging Face Trainer",
            "",
            *lines,
            "",
            "`hf-clm COMMAND --help` lists its options. --traceback shows where an error arose.",
            "On several GPUs: accelerate launch --multi_gpu -m hf_clm train RECIPE",
        ]
    )


def run_train(words: list[str]) -> None:
    """RECIPE [--key value ...]: train, and write a folder that from_pretrained opens"""
    from hf_clm.config import load_recipe, recipe_help

    recipe, overrides = _recipe_words(words, "train")
    if recipe is None:
        print(recipe_help())
        return
    loaded = load_recipe(recipe, overrides)
    _quiet_libraries()
    from hf_clm.training.run import train  # torch and transformers take seconds to import

    train(loaded, is_terminal=sys.stderr.isatty())


def run_prepare(words: list[str]) -> None:
    """RECIPE [--key value ...]: tokenize, pack and prove the data once; train finds them ready"""
    from hf_clm.config import load_recipe, recipe_help

    recipe, overrides = _recipe_words(words, "prepare")
    if recipe is None:
        print(recipe_help())
        return
    loaded = load_recipe(recipe, overrides)
    _quiet_libraries()
    from hf_clm.training.prepare import prepare_recipe

    print("\n".join(prepare_recipe(loaded)))


def run_config(words: list[str]) -> None:
    """RECIPE [--key value ...]: print every value of a recipe and where it came from"""
    from hf_clm.config import describe_recipe, load_recipe, recipe_help

    recipe, overrides = _recipe_words(words, "config")
    if recipe is None:
        print(recipe_help())
        return
    rows = describe_recipe(load_recipe(recipe, overrides))
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{width}}  {json.dumps(value, ensure_ascii=False):<40}  {origin}")


def run_inspect(words: list[str]) -> None:
    """RECIPE|RUN [--key value ...]: show what is trained, token by token, as the model gets it"""
    parser = _Parser("hf-clm inspect")
    parser.add_argument("target", help="a recipe, or a run's folder")
    parser.add_argument("--rows", type=_at_least(0), default=5, help="rows to print (%(default)s)")
    parser.add_argument("--html", nargs="?", const="labels.html", help="also write a page (%(const)s)")
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="(%(default)s)")
    parser.add_argument("--worst", action="store_true", help="look at all rows; those with flags first")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="(%(default)s)")
    options, overrides = parser.parse_known_args(words)
    _quiet_libraries()
    from hf_clm.inspector.command import View, inspect

    view = View(options.rows, options.html, options.split, options.color, options.worst)
    print(inspect(options.target, overrides, view=view))


def run_doctor(words: list[str]) -> int:
    """RECIPE [--key value ...]: find what would go wrong, and the memory it takes, without a step"""
    parser = _Parser("hf-clm doctor")
    parser.add_argument("recipe")
    parser.add_argument("--no_measure", action="store_true", help="only estimate the memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, overrides = parser.parse_known_args(words)
    from hf_clm.config import load_recipe

    recipe = load_recipe(options.recipe, overrides)
    _quiet_libraries()
    from hf_clm.doctor.command import diagnose

    found = diagnose(recipe, measure=not options.no_measure)
    print(json.dumps(found.to_json(), ensure_ascii=False) if options.json else "\n".join(found.to_lines()))
    return int(found.exit_code)


def run_generate(words: list[str]) -> None:
    """RUN --prompt TEXT: let a model answer, with the prompt format and stop tokens of its training"""
    options = _generate_parser().parse_args(words)
    _quiet_libraries()
    from hf_clm.generation.command import generate_from_run

    answers = generate_from_run(options)
    for prompt, answer in answers:
        if options.json:
            entry = {
                "prompt": prompt,
                "text": answer.text,
                "tokens": answer.tokens,
                "stopped": answer.stopped,
            }
            print(json.dumps(entry, ensure_ascii=False))
        elif len(answers) == 1:
            print(answer.text)
        else:
            print(f"> {prompt}\n{answer.text}\n")


def run_evaluate(words: list[str]) -> None:
    """RUN DATA: loss, perplexity, bits per byte, token accuracy, exact match of generated answers"""
    parser = _Parser("hf-clm evaluate")
    parser.add_argument("run", help="a run's folder, any model folder, or a name on the Hub")
    parser.add_argument("data", help="a file, a glob, a folder, or a dataset on the Hub")
    parser.add_argument("--format", choices=get_args(Format), help="of the data; default: told from the keys")
    parser.add_argument(
        "--stage", choices=("pretrain", "sft"), help="what counts as target; default: the run's own"
    )
    parser.add_argument("--max_length", type=_at_least(2), help="tokens in a row; default: the run's own")
    parser.add_argument(
        "--batch_size", type=_at_least(1), default=8, help="rows at once; changes no figure (%(default)s)"
    )
    parser.add_argument(
        "--max_new_tokens", type=_at_least(1), help="of an answer; default: 256, or what fits"
    )
    parser.add_argument("--no_generate", action="store_true", help="leave out the generated answers")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.evaluation.command import evaluate_run

    result = evaluate_run(options)
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for key, value in result.items():
        print(f"{key:<16} {value:,}" if isinstance(value, int) else f"{key:<16} {value:.4f}")


def run_report(words: list[str]) -> None:
    """RUN: write a run's report.html again, as far as an interrupted run came"""
    parser = _Parser("hf-clm report")
    parser.add_argument("run", help="the folder of a run")
    options = parser.parse_args(words)
    from hf_clm.report.page import write_report

    record = write_report(options.run)
    counts = f"{len(record.metrics):,} log events, {len(record.samples):,} samples, status {record.status}"
    print(f"wrote {record.folder / 'report.html'}: {counts}")
    if record.unreadable:
        print(f"left out: unreadable lines of its logs: {record.unreadable}")


def run_compare(words: list[str]) -> None:
    """RUN RUN [RUN ...]: figures side by side, what tells the recipes apart, and the curves in one page"""
    parser = _Parser("hf-clm compare")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--html", default="compare.html", help="the page to write (%(default)s)")
    options = parser.parse_args(words)
    from hf_clm.report.compare import compare

    print("\n".join([*compare(options.runs, path=options.html).to_lines(), "", f"wrote {options.html}"]))


def run_merge(words: list[str]) -> None:
    """RUN --output_dir FOLDER: write a plain model of a LoRA run, and prove that it is the same"""
    parser = _Parser("hf-clm merge")
    parser.add_argument("run", help="the folder of a run with lora, or one of its checkpoints")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, help="of the merged weights; default: the base model's")
    parser.add_argument(
        "--tolerance", type=_at_least(0.0), help="largest difference, as a share of the largest logit"
    )
    parser.add_argument("--prompts", help="compare on these, as --file of generate; default: the run's data")
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.merge import merge

    print("\n".join(merge(options)))


def run_bench(words: list[str]) -> None:
    """RECIPE [--key value ...]: measure the speed of a recipe on this machine; nothing it trains is kept"""
    parser = _Parser("hf-clm bench")
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=_at_least(5), default=30, help="to measure (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options, overrides = parser.parse_known_args(words)
    from hf_clm.bench.command import bench, writable
    from hf_clm.config import load_recipe

    recipe = load_recipe(options.recipe, overrides)
    path = writable(options.json) if options.json else None
    found = bench(recipe, steps=options.steps, say=lambda line: print(line, flush=True))
    print("\n".join(found.to_lines()))
    if path:
        path.write_text(json.dumps(found.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def run_train_tokenizer(words: list[str]) -> None:
    """DATA... --output_dir FOLDER: train a byte-level BPE tokenizer"""
    parser = _Parser("hf-clm train-tokenizer")
    parser.add_argument("data", nargs="+", help="files, globs, folders, or datasets on the Hub")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    parser.add_argument("--vocab_size", type=_at_least(258), default=4096, help="tokens (%(default)s)")
    parser.add_argument(
        "--min_frequency", type=_at_least(1), default=2, help="of a pair that is merged (%(default)s)"
    )
    parser.add_argument("--pad_token", default="<|pad|>", help="(%(default)s)")
    parser.add_argument("--format", choices=get_args(Format), help="of the data; default: told from the keys")
    options = parser.parse_args(words)
    from hf_clm.config import Data, Source
    from hf_clm.data.build import load_examples, texts_of
    from hf_clm.train_tokenizer import train_bpe

    sources = [Source(path=path, format=options.format) for path in options.data]
    examples = load_examples(sources, Data(train=sources))
    sizes = {"vocab_size": options.vocab_size, "min_frequency": options.min_frequency}
    tokenizer = train_bpe(texts_of(examples.examples), pad_token=options.pad_token, **sizes)
    tokenizer.save_pretrained(options.output_dir)
    print(f"{len(tokenizer):,} tokens from {len(examples):,} records, written to {options.output_dir}")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": run_train,
    "prepare": run_prepare,
    "config": run_config,
    "inspect": run_inspect,
    "doctor": run_doctor,
    "generate": run_generate,
    "evaluate": run_evaluate,
    "report": run_report,
    "compare": run_compare,
    "merge": run_merge,
    "bench": run_bench,
    "train-tokenizer": run_train_tokenizer,
}


class _Parser(argparse.ArgumentParser):
    """Without abbreviations, and with our one-line errors."""

    def __init__(self, prog: str):
        super().__init__(prog, description=(COMMANDS[prog.split()[1]].__doc__ or ""), allow_abbrev=False)

    def error(self, message: str) -> Any:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = next((word for word in message.split() if word.startswith("--")), "")
        raise RecipeError(
            message + (did_you_mean(unknown, known) if unknown not in known else ""), where=self.prog
        )


def _generate_parser() -> _Parser:
    parser = _Parser("hf-clm generate")
    parser.add_argument("run", help="a run's folder, any model folder, or a name on the Hub")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--input", default="", help="the input that belongs to an instruction")
    parser.add_argument("--file", help="prompts: a txt file with one a line, or records in the run's format")
    parser.add_argument(
        "--raw", action="store_true", help="take the prompt as it is, without the run's format"
    )
    parser.add_argument("--max_new_tokens", type=_at_least(1), help="default: 256, or what fits")
    parser.add_argument("--temperature", type=_at_least(0.0), default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--top_k", type=_at_least(1), help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top_p",
        type=_at_least(0.0, most=1.0),
        help="sample among the likeliest tokens of this total probability",
    )
    parser.add_argument("--num_beams", type=_at_least(1), default=1, help="beam search (%(default)s)")
    parser.add_argument(
        "--no_repeat_ngram_size", type=_at_least(0), default=0, help="repeat no n tokens (0: off)"
    )
    parser.add_argument("--repetition_penalty", type=_at_least(0.01), default=1.0, help="(%(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], help="a text that ends the answer; may be repeated"
    )
    parser.add_argument("--batch_size", type=_at_least(1), default=16, help="prompts at once (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    return parser


def _at_least(least: float, *, most: float = math.inf) -> Callable[[str], float]:
    """Reads a number of the kind of ``least`` that is neither smaller than it nor greater than ``most``."""
    kind = type(least)

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            expected = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def _recipe_words(words: list[str], command: str) -> tuple[str | None, list[str]]:
    """The recipe and the overrides; None for --help."""
    if "-h" in words or "--help" in words:
        return None, []
    if not words or words[0].startswith("-"):
        raise RecipeError(
            "needs a recipe", where=f"hf-clm {command}", fix=f"hf-clm {command} RECIPE [--key value ...]"
        )
    return words[0], words[1:]


def _quiet_libraries() -> None:
    """No progress bars of weight loading between our lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns at every forked worker
    from transformers.utils import logging

    logging.disable_progress_bar()


def _fail(message: str, code: int, *, shows_traceback: bool) -> int:
    """Prints the error once: on rank 0, or where the environment of one machine is at fault."""
    rank = os.environ.get("RANK", "0")
    if shows_traceback:
        traceback.print_exc()
    if rank == "0" or code == ExitCode.ENVIRONMENT:
        print(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr)
    return int(code)

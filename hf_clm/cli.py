"""The command line. Each subcommand loads a recipe or a run, calls one function, and prints the result."""

import errno
import importlib.util
import io
import json
import os
import platform
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from logging import ERROR, getLogger
from pathlib import Path

from hf_clm.errors import ExitCode, Preempted, RecipeError, UserError, did_you_mean, needing_packages
from hf_clm.logs import VARIABLE, to_json, to_json_lines, writes_json
from hf_clm.machine import is_first_here, version_of
from hf_clm.options import (
    DTYPES,
    Parser,
    add_chat_options,
    add_device,
    add_doctor_options,
    add_evaluate_options,
    add_export_options,
    add_generate_options,
    add_inspect_options,
    add_prepare_options,
    add_serve_options,
    add_train_tokenizer_options,
    add_why_options,
    at_least,
    is_drafted,
    writable,
)

ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

EXIT_CODES = {
    ExitCode.DONE: "done",
    ExitCode.RECIPE: "a mistake in the recipe or on the command line",
    ExitCode.DATA: "a mistake in the data",
    ExitCode.MODEL: "a model or tokenizer that cannot be used",
    ExitCode.DIVERGED: "the loss or a gradient is not finite; stopped before the update",
    ExitCode.ENVIRONMENT: "the disk, memory, network or permissions; a checkpoint or a run that is damaged",
    ExitCode.PREEMPTED: "stopped by a signal after saving a checkpoint; the same command resumes",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code. Prints a UserError as one line on stderr."""
    words = list(sys.argv[1:] if words is None else words)
    shows_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return ExitCode.DONE
    if words[0] in ("-V", "--version"):
        print(version_text())
        return ExitCode.DONE
    try:
        if words[0] not in COMMANDS:
            fix = f"one of {', '.join(COMMANDS)}{did_you_mean(words[0], COMMANDS)}"
            raise RecipeError("no such command", got=repr(words[0]), fix=fix)
        with needing_packages():
            return COMMANDS[words[0]](words[1:]) or ExitCode.DONE
    except Preempted as stopped:
        return int(stopped.code or 0)
    except UserError as error:
        return _fail(str(error), error.exit_code, shows_traceback=shows_traceback, is_own=error.is_own)
    except KeyboardInterrupt:
        return _fail("interrupted", ExitCode.INTERRUPTED, shows_traceback=shows_traceback)
    except BrokenPipeError:  # as with `hf-clm inspect RECIPE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}", ExitCode.ENVIRONMENT, shows_traceback=shows_traceback)


def help_text() -> str:
    """Returns the text of ``hf-clm --help``."""
    lines = [f"  hf-clm {name:<16} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "hf-clm: pretraining and fine-tuning of causal language models on the Hugging Face Trainer",
            "",
            *lines,
            "",
            "`hf-clm COMMAND --help` lists its options. --traceback shows where an error occurred.",
            "On several GPUs: accelerate launch --multi_gpu -m hf_clm train RECIPE",
            "",
            "Exit codes:",
            *(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()),
        ]
    )


def version_text() -> str:
    """What ``hf-clm --version`` prints."""
    packages = ("torch", "transformers", "accelerate", "datasets")
    versions = [f"{name} {version_of(name) or 'is not installed'}" for name in packages]
    own = version_of("hf_clm") or "(not installed)"
    return f"hf_clm {own}, {', '.join(versions)}, Python {platform.python_version()}"


def run_train(words: list[str]) -> None:
    """RECIPE [--key value ...], or --model MODEL --data FILE: train a model, and save it"""
    from hf_clm.data.read.faults import check_data  # before torch, whose import takes seconds
    from hf_clm.draft import open_recipe, to_lines
    from hf_clm.recipe.recipe import recipe_help

    recipe, overrides = _recipe_words(words, "train")
    if recipe is None:
        print(recipe_help())
        return
    loaded = open_recipe(recipe, overrides)
    if is_first_here() and (lines := to_lines(loaded)):
        print("\n".join(to_json_lines("\n".join(lines), {}) if writes_json() else lines), flush=True)
    check_data(loaded)
    _quiet_libraries()
    from hf_clm.training.run import train  # torch and transformers take seconds to import

    train(loaded, is_terminal=sys.stderr.isatty())


def run_prepare(words: list[str]) -> None:
    """RECIPE [--ray local|ADDRESS] [--key value ...]: tokenize, pack and verify the data in advance"""
    parser = _parser("prepare")
    add_prepare_options(parser)
    if "-h" in words or "--help" in words:
        from hf_clm.recipe.recipe import recipe_help

        print(f"{parser.format_help()}\n{recipe_help()}")
        return
    options, overrides = parser.parse_with_overrides(words)
    from hf_clm.data.read.faults import check_data
    from hf_clm.draft import open_recipe

    recipe = open_recipe(options.recipe, overrides, options=parser.names)
    check_data(recipe)
    _quiet_libraries()
    from hf_clm.training.prepare import prepare_recipe

    print("\n".join(prepare_recipe(recipe, ray=options.ray)))


def run_config(words: list[str]) -> None:
    """RECIPE [--key value ...]: print every value of a recipe and its origin"""
    from hf_clm.draft import open_recipe
    from hf_clm.recipe.recipe import describe_recipe, recipe_help

    recipe, overrides = _recipe_words(words, "config")
    if recipe is None:
        print(recipe_help())
        return
    rows = describe_recipe(open_recipe(recipe, overrides))
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{width}}  {json.dumps(value, ensure_ascii=False):<40}  {origin}")


def run_recipes(words: list[str]) -> None:
    """list the recipes that come with hf_clm; hf-clm train NAME runs one"""
    _parser("recipes").parse_args(words)
    from hf_clm.recipe.shipped import list_recipes, shipped_folder

    recipes = list_recipes()
    width = max(len(name) for name, _ in recipes)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in recipes))
    print(f"\nhf-clm train NAME [--key VALUE ...]; the files are in {shipped_folder() / 'recipes'}")


def run_inspect(words: list[str]) -> None:
    """RECIPE|RUN [--key value ...]: show the training data token by token, as the model receives them"""
    parser = _parser("inspect")
    add_inspect_options(parser)
    options, overrides = parser.parse_with_overrides(words)
    from hf_clm.data.read.faults import check_data
    from hf_clm.draft import open_recipe

    check_data(open_recipe(options.target, overrides, options=parser.names))
    _quiet_libraries()
    from hf_clm.pages.inspection import View, inspect

    view = View(options.rows, options.html, options.split, options.color, options.worst)
    print(inspect(options.target, overrides, view=view, options=parser.names))


def run_doctor(words: list[str]) -> int:
    """RECIPE [--key value ...]: find problems of a recipe and the memory it needs, or --plan for many GPUs"""
    parser = _parser("doctor")
    add_doctor_options(parser)
    options, overrides = parser.parse_with_overrides(words)
    from hf_clm.data.read.faults import check_data
    from hf_clm.draft import open_recipe

    if options.plan is not None:
        return _plan(options, overrides, names=parser.names)
    if options.recipe is None:
        raise RecipeError(
            "needs a recipe", where="hf-clm doctor", fix="hf-clm doctor RECIPE [--key value ...]"
        )
    recipe = open_recipe(options.recipe, overrides, options=parser.names)
    if not options.json:
        check_data(recipe)
    _quiet_libraries()
    from hf_clm.doctor.command import diagnose

    diagnosis = diagnose(recipe, measure=not options.no_measure)
    text = json.dumps(diagnosis.to_json(), ensure_ascii=False)
    print(text if options.json else "\n".join(diagnosis.to_lines()))
    return int(diagnosis.exit_code)


def run_generate(words: list[str]) -> None:
    """RUN --prompt TEXT: generate answers, with the prompt format and stop tokens of training"""
    parser = _parser("generate")
    add_generate_options(parser)
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.generation.generate import generate_from_run

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


def run_chat(words: list[str]) -> None:
    """RUN: chat with a model, with the prompt format and stop tokens of training"""
    parser = _parser("chat")
    add_chat_options(parser)
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.generation.chat import chat

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # chat reports text that is not UTF-8
    sign = "> " if sys.stdin.isatty() else ""
    if sign and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() a history and line editing
    chat(options, read=lambda: input(sign), write=lambda text: print(text, end="", flush=True))


def run_serve(words: list[str]) -> None:
    """RUN: serve a model with an OpenAI-compatible API, and a chat page for browsers"""
    parser = _parser("serve")
    add_serve_options(parser)
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.generation.serve import serve

    serve(options, say=lambda line: print(line, flush=True))


def run_evaluate(words: list[str]) -> None:
    """RUN DATA...: measure loss, perplexity, bits per byte and token accuracy, and answers or choices"""
    parser = _parser("evaluate")
    add_evaluate_options(parser)
    options = parser.parse_args(words)
    page = writable(options.html, "--html") if options.html else None
    _quiet_libraries()
    from hf_clm.evaluation.evaluate import evaluate_run, to_lines
    from hf_clm.pages.losses import write_losses

    evaluation = evaluate_run(options)
    figures = evaluation.to_json()
    if page:
        write_losses(page, evaluation, title=f"{options.run} on {', '.join(options.data)}", rows=options.rows)
    print(json.dumps(figures, ensure_ascii=False) if options.json else "\n".join(to_lines(figures)))


def run_report(words: list[str]) -> None:
    """RUN: write the report.html of a run again, even if it was interrupted"""
    parser = _parser("report")
    parser.add_argument("run", help="the folder of a run")
    options = parser.parse_args(words)
    from hf_clm.pages.report import write_report

    run = write_report(options.run)
    counts = f"{len(run.metrics):,} log events, {len(run.samples):,} samples, status {run.record.status}"
    print(f"wrote {run.path / 'report.html'}: {counts}")
    if run.unreadable:
        print(f"skipped unreadable lines of its logs: {run.unreadable}")


def run_checkpoints(words: list[str]) -> int:
    """RUN: list the checkpoints and verify their files; exit code 6 if one is damaged"""
    parser = _parser("checkpoints")
    parser.add_argument("run", help="the folder of a run")
    options = parser.parse_args(words)
    from hf_clm.training.checkpoints import describe_checkpoints

    lines, are_intact = describe_checkpoints(Path(options.run))
    print("\n".join(lines))
    return ExitCode.DONE if are_intact else ExitCode.ENVIRONMENT


def run_verify(words: list[str]) -> int:
    """RUN [--spans 3]: check all hashes of a run, and replay parts of it; exit code 6 if something differs"""
    parser = _parser("verify")
    parser.add_argument("run", help="the folder of a run")
    text = "number of spans between saved states to replay, drawn at random (%(default)s)"
    parser.add_argument("--spans", type=at_least(0), default=3, help=text)
    options, overrides = parser.parse_with_overrides(words)
    from hf_clm.draft import open_recipe
    from hf_clm.run_folder import load_folder

    recipe = open_recipe(str(load_folder(options.run).path), overrides, options=parser.names)
    _quiet_libraries()
    from hf_clm.replay.verify import verify

    verification = verify(options.run, recipe, spans=options.spans)
    return ExitCode.DONE if verification.is_valid else ExitCode.ENVIRONMENT


def run_why(words: list[str]) -> None:
    """RUN --prompt TEXT: find and prove which training rows taught an answer; also --step N, --without ROW"""
    parser = _parser("why")
    add_why_options(parser)
    options, overrides = parser.parse_with_overrides(words)
    if not options.prompt and (options.answer or options.until):
        raise RecipeError("have no effect without --prompt", where="--answer and --until", fix="remove them")
    from hf_clm.draft import open_recipe
    from hf_clm.run_folder import load_folder

    recipe = open_recipe(str(load_folder(options.run).path), overrides, options=parser.names)
    options.html = writable(options.html, "--html") if options.html else None
    _quiet_libraries()
    from hf_clm.replay.steps import inspect_step, train_without
    from hf_clm.replay.why import why

    command = inspect_step if options.step else train_without if options.without else why
    lines = command(options, recipe)
    if is_first_here():
        print("\n".join(lines))


def run_compare(words: list[str]) -> None:
    """RUN RUN [RUN ...]: compare the results and recipes of runs, and draw their curves on one page"""
    parser = _parser("compare")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--html", default="compare.html", help="the page to write (%(default)s)")
    options = parser.parse_args(words)
    from hf_clm.pages.compare import compare

    print("\n".join([*compare(options.runs, path=options.html).to_lines(), "", f"wrote {options.html}"]))


def run_merge(words: list[str]) -> None:
    """RUN --output_dir FOLDER: merge the adapters of a LoRA run into its model, and verify the result"""
    parser = _parser("merge")
    parser.add_argument("run", help="the folder of a run with lora, or one of its checkpoints")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the merged weights; default: that of the base model"
    )
    parser.add_argument(
        "--tolerance", type=at_least(0.0), help="maximum difference, relative to the largest logit"
    )
    parser.add_argument(
        "--prompts", help="file of prompts to compare on, like --file of generate; default: the run's data"
    )
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.merge import merge

    print("\n".join(merge(options)))


def run_export(words: list[str]) -> None:
    """RUN --to gguf|ollama|safetensors --output_dir FOLDER: convert a model, and compare its answers"""
    parser = _parser("export")
    add_export_options(parser)
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.export.export import export

    print("\n".join(export(options)))


def run_bench(words: list[str]) -> None:
    """RECIPE [--key value ...]: measure the speed of a recipe, and where the time of a step goes"""
    parser = _parser("bench")
    parser.add_argument("recipe")
    parser.add_argument(
        "--steps", type=at_least(5), default=30, help="number of steps to measure (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    options, overrides = parser.parse_with_overrides(words)
    from hf_clm.data.read.faults import check_data
    from hf_clm.draft import open_recipe

    recipe = open_recipe(options.recipe, overrides, options=parser.names)
    check_data(recipe)
    from hf_clm.bench import bench

    path = writable(options.json, "--json") if options.json else None
    result = bench(recipe, steps=options.steps, say=lambda line: print(line, flush=True))
    print("\n".join(result.to_lines()))
    if path:
        path.write_text(json.dumps(result.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def run_train_tokenizer(words: list[str]) -> None:
    """DATA... --output_dir FOLDER: train a tokenizer"""
    parser = _parser("train-tokenizer")
    add_train_tokenizer_options(parser)
    options = parser.parse_args(words)
    from hf_clm.data.prepared.sets import load_examples
    from hf_clm.recipe.recipe import Data, Source
    from hf_clm.text.train_tokenizer import train_tokenizer

    sources = [Source(path=path, format=options.format) for path in options.data]
    examples = load_examples(Data(train=sources))
    texts = (text for example in examples.examples for text in example.texts if text)
    tokenizer = train_tokenizer(
        texts,
        kind=options.kind,
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        pad_token=options.pad_token,
    )
    tokenizer.save_pretrained(options.output_dir)
    print(f"{len(tokenizer):,} tokens from {len(examples):,} records, written to {options.output_dir}")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": run_train,
    "prepare": run_prepare,
    "recipes": run_recipes,
    "config": run_config,
    "inspect": run_inspect,
    "doctor": run_doctor,
    "generate": run_generate,
    "chat": run_chat,
    "serve": run_serve,
    "evaluate": run_evaluate,
    "report": run_report,
    "checkpoints": run_checkpoints,
    "verify": run_verify,
    "why": run_why,
    "compare": run_compare,
    "merge": run_merge,
    "export": run_export,
    "bench": run_bench,
    "train-tokenizer": run_train_tokenizer,
}


def _parser(command: str) -> Parser:
    return Parser(f"hf-clm {command}", COMMANDS[command].__doc__ or "")


def _plan(options: Namespace, overrides: list[str], *, names: list[str]) -> int:
    """Runs ``hf-clm doctor --plan`` for a recipe, or without one for models from 0.5B to 72B."""
    from hf_clm.draft import open_recipe

    recipe = open_recipe(options.recipe, overrides, options=names) if options.recipe is not None else None
    _quiet_libraries()
    from hf_clm.doctor.plan import parse_cluster, plan_family, plan_recipe

    cluster = parse_cluster(options.plan, length=recipe.data.max_length if recipe else None)
    lines, plan = plan_recipe(recipe, cluster) if recipe else plan_family(cluster)
    print(json.dumps(plan, ensure_ascii=False) if options.json else "\n".join(lines))
    return ExitCode.DONE


def _recipe_words(words: list[str], command: str) -> tuple[str | None, list[str]]:
    """Returns the recipe (empty if --model and --data replace it) and the overrides; None for --help."""
    if "-h" in words or "--help" in words:
        return None, []
    if is_drafted(words):
        return "", words
    if not words or words[0].startswith("-"):
        fix = f"hf-clm {command} RECIPE, or hf-clm {command} --model MODEL --data FILE"
        raise RecipeError("needs a recipe", where=f"hf-clm {command}", fix=f"{fix} [--key value ...]")
    return words[0], words[1:]


def _quiet_libraries() -> None:
    """Turns off progress bars and warnings of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # prevents a warning in every forked worker
    from transformers.utils import logging

    logging.disable_progress_bar()
    getLogger("matplotlib").setLevel(ERROR)  # warns about its font cache without a home folder


def _fail(message: str, code: int, *, shows_traceback: bool, is_own: bool | None = None) -> int:
    """Prints the error, unless the first process of this machine reports the same one."""
    rank = os.environ.get("RANK", "0")
    if shows_traceback:
        traceback.print_exc()
    if is_own or (is_own is None and (is_first_here() or code == ExitCode.ENVIRONMENT)):
        if os.environ.get(VARIABLE) == "json":
            print(to_json("error", message, {"exit_code": int(code), "rank": int(rank)}), file=sys.stderr)
        else:
            print(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr)
    return int(code)

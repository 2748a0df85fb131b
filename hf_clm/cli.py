"""The command line: each subcommand loads a recipe or a run, calls one function, and prints."""

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

from hf_clm.errors import ExitCode, Preempted, RecipeError, UserError, did_you_mean
from hf_clm.logs import VARIABLE, to_json, to_json_lines, writes_json
from hf_clm.machine import is_first_here, version_of
from hf_clm.options import (
    Parser,
    add_chat_options,
    add_doctor_options,
    add_evaluate_options,
    add_generate_options,
    add_inspect_options,
    add_prepare_options,
    add_serve_options,
    add_train_tokenizer_options,
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
    ExitCode.ENVIRONMENT: "the disk, memory, network or permissions, or a damaged checkpoint",
    ExitCode.PREEMPTED: "stopped by a signal after saving a checkpoint; the same command resumes",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code. What a user can fix is one line on stderr."""
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
        return COMMANDS[words[0]](words[1:]) or ExitCode.DONE
    except Preempted as stopped:
        return int(stopped.code or 0)
    except UserError as error:
        own = {"is_own": error.is_own, "shows_traceback": shows_traceback}
        return _fail(str(error), error.exit_code, **own)
    except KeyboardInterrupt:
        return _fail("interrupted", ExitCode.INTERRUPTED, shows_traceback=shows_traceback)
    except BrokenPipeError:  # as of `hf-clm inspect RECIPE | head`: nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
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
    """RECIPE [--key value ...], or --model MODEL --data FILE: train, and write a folder like any model"""
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
    """RECIPE [--ray local|ADDRESS] [--key value ...]: tokenize, pack and prove the data once"""
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
    """RECIPE [--key value ...]: print every value of a recipe and where it came from"""
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
    """RECIPE|RUN [--key value ...]: show what is trained, token by token, as the model gets it"""
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
    """RECIPE [--key value ...]: what would go wrong, the memory it takes, and --plan for many GPUs"""
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

    found = diagnose(recipe, measure=not options.no_measure)
    print(json.dumps(found.to_json(), ensure_ascii=False) if options.json else "\n".join(found.to_lines()))
    return int(found.exit_code)


def run_generate(words: list[str]) -> None:
    """RUN --prompt TEXT: let a model answer, with the prompt format and stop tokens of its training"""
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
    """RUN: talk with a model, with the prompt format and stop tokens of its training"""
    parser = _parser("chat")
    add_chat_options(parser)
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.generation.chat import chat

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # chat says which text is not UTF-8
    sign = "> " if sys.stdin.isatty() else ""
    if sign and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # input() then has a history, and arrow keys move in the line
    chat(options, read=lambda: input(sign), write=lambda text: print(text, end="", flush=True))


def run_serve(words: list[str]) -> None:
    """RUN: answer over HTTP as OpenAI's API does, with a page for a browser"""
    parser = _parser("serve")
    add_serve_options(parser)
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.generation.serve import serve

    serve(options, say=lambda line: print(line, flush=True))


def run_evaluate(words: list[str]) -> None:
    """RUN DATA...: loss, perplexity, bits per byte, token accuracy, answers or choices"""
    parser = _parser("evaluate")
    add_evaluate_options(parser)
    options = parser.parse_args(words)
    page = writable(options.html, "--html") if options.html else None
    _quiet_libraries()
    from hf_clm.evaluation.evaluate import evaluate_run, to_lines
    from hf_clm.pages.losses import write_losses

    evaluation = evaluate_run(options)
    found = evaluation.to_json()
    if page:
        write_losses(page, evaluation, title=f"{options.run} on {', '.join(options.data)}", rows=options.rows)
    print(json.dumps(found, ensure_ascii=False) if options.json else "\n".join(to_lines(found)))


def run_report(words: list[str]) -> None:
    """RUN: write a run's report.html again, as far as an interrupted run came"""
    parser = _parser("report")
    parser.add_argument("run", help="the folder of a run")
    options = parser.parse_args(words)
    from hf_clm.pages.report import write_report

    run = write_report(options.run)
    counts = f"{len(run.metrics):,} log events, {len(run.samples):,} samples, status {run.record.status}"
    print(f"wrote {run.path / 'report.html'}: {counts}")
    if run.unreadable:
        print(f"left out: unreadable lines of its logs: {run.unreadable}")


def run_checkpoints(words: list[str]) -> int:
    """RUN: list the checkpoints, and read whether they are as they were saved; exit code 6 if one is not"""
    parser = _parser("checkpoints")
    parser.add_argument("run", help="the folder of a run")
    options = parser.parse_args(words)
    from hf_clm.training.checkpoints import describe_checkpoints

    lines, are_whole = describe_checkpoints(Path(options.run))
    print("\n".join(lines))
    return ExitCode.DONE if are_whole else ExitCode.ENVIRONMENT


def run_compare(words: list[str]) -> None:
    """RUN RUN [RUN ...]: figures side by side, what tells the recipes apart, and the curves in one page"""
    parser = _parser("compare")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--html", default="compare.html", help="the page to write (%(default)s)")
    options = parser.parse_args(words)
    from hf_clm.pages.compare import compare

    print("\n".join([*compare(options.runs, path=options.html).to_lines(), "", f"wrote {options.html}"]))


def run_merge(words: list[str]) -> None:
    """RUN --output_dir FOLDER: write a plain model of a LoRA run, and prove that it is the same"""
    parser = _parser("merge")
    parser.add_argument("run", help="the folder of a run with lora, or one of its checkpoints")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, help="of the merged weights; default: the base model's")
    parser.add_argument(
        "--tolerance", type=at_least(0.0), help="largest difference, as a share of the largest logit"
    )
    parser.add_argument("--prompts", help="compare on these, as --file of generate; default: the run's data")
    options = parser.parse_args(words)
    _quiet_libraries()
    from hf_clm.merge import merge

    print("\n".join(merge(options)))


def run_bench(words: list[str]) -> None:
    """RECIPE [--key value ...]: measure the speed of a recipe on this machine; nothing it trains is kept"""
    parser = _parser("bench")
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=at_least(5), default=30, help="to measure (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options, overrides = parser.parse_with_overrides(words)
    from hf_clm.data.read.faults import check_data
    from hf_clm.draft import open_recipe

    recipe = open_recipe(options.recipe, overrides, options=parser.names)
    check_data(recipe)
    from hf_clm.bench import bench

    path = writable(options.json, "--json") if options.json else None
    found = bench(recipe, steps=options.steps, say=lambda line: print(line, flush=True))
    print("\n".join(found.to_lines()))
    if path:
        path.write_text(json.dumps(found.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


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
    chosen = {name: getattr(options, name) for name in ("kind", "vocab_size", "min_frequency", "pad_token")}
    texts = (text for example in examples.examples for text in example.texts if text)
    tokenizer = train_tokenizer(texts, **chosen)
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
    "compare": run_compare,
    "merge": run_merge,
    "bench": run_bench,
    "train-tokenizer": run_train_tokenizer,
}


def _parser(command: str) -> Parser:
    return Parser(f"hf-clm {command}", COMMANDS[command].__doc__ or "")


def _plan(options: Namespace, overrides: list[str], *, names: list[str]) -> int:
    """``hf-clm doctor --plan``: of a recipe, or without one of models from 0.5B to 72B."""
    from hf_clm.draft import open_recipe

    recipe = open_recipe(options.recipe, overrides, options=names) if options.recipe is not None else None
    _quiet_libraries()
    from hf_clm.doctor.plan import parse_cluster, plan_family, plan_recipe

    cluster = parse_cluster(options.plan, length=recipe.data.max_length if recipe else None)
    lines, found = plan_recipe(recipe, cluster) if recipe else plan_family(cluster)
    print(json.dumps(found, ensure_ascii=False) if options.json else "\n".join(lines))
    return ExitCode.DONE


def _recipe_words(words: list[str], command: str) -> tuple[str | None, list[str]]:
    """The recipe (empty where --model and --data replace it) and the overrides; None for --help."""
    if "-h" in words or "--help" in words:
        return None, []
    if is_drafted(words):
        return "", words
    if not words or words[0].startswith("-"):
        fix = f"hf-clm {command} RECIPE, or hf-clm {command} --model MODEL --data FILE"
        raise RecipeError("needs a recipe", where=f"hf-clm {command}", fix=f"{fix} [--key value ...]")
    return words[0], words[1:]


def _quiet_libraries() -> None:
    """No progress bars of weight loading, and no words on caches, between our lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns at every forked worker
    from transformers.utils import logging

    logging.disable_progress_bar()
    getLogger("matplotlib").setLevel(ERROR)  # without a home it says twice where it keeps its fonts


def _fail(message: str, code: int, *, shows_traceback: bool, is_own: bool | None = None) -> int:
    """Prints the error, unless it is one that the first process of this machine meets too, and reports."""
    rank = os.environ.get("RANK", "0")
    if shows_traceback:
        traceback.print_exc()
    if is_own or (is_own is None and (is_first_here() or code == ExitCode.ENVIRONMENT)):
        if os.environ.get(VARIABLE) == "json":
            print(to_json("error", message, {"exit_code": int(code), "rank": int(rank)}), file=sys.stderr)
        else:
            print(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr)
    return int(code)

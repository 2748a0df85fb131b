"""The options of commands, with errors of one line."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from hf_clm.errors import RecipeError, did_you_mean
from hf_clm.generation.decoding import SETTINGS, Decoding, update_decoding
from hf_clm.schema import Format, TokenizerKind


class Parser(argparse.ArgumentParser):
    """Without abbreviations, and with our one-line errors."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raises RecipeError, with the nearest option for one that is not known."""
        words = [word.strip(":,").partition("=")[0] for word in message.split() if word.startswith("--")]
        raise RecipeError(message + self._nearest(*words[:1]), where=self.prog)

    @property
    def names(self) -> list[str]:
        """Those of its own options, without the dashes."""
        options = [option for action in self._actions for option in action.option_strings]
        return [option.removeprefix("--") for option in options if option.startswith("--")]

    def parse_with_overrides(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the other words: overrides of the recipe, which is the first word of all.

        The recipe is empty where ``--model`` and ``--data`` are given in its place. Raises RecipeError for
        overrides before a recipe: argparse takes the value of one for the recipe.
        """
        options, overrides = self.parse_known_args(["", *words] if is_drafted(words) else words)
        recipe = getattr(options, next(action.dest for action in self._actions if not action.option_strings))
        if overrides and (recipe is None or (recipe and words.index(overrides[0]) < words.index(recipe))):
            got = f"{overrides[0]}{self._nearest(overrides[0])}"
            fix = f"{self.prog} RECIPE [--key value ...]"
            raise RecipeError("overrides need a recipe before them", where=self.prog, got=got, fix=fix)
        return options, overrides

    def _nearest(self, word: str = "") -> str:
        known = [f"--{name}" for name in self.names]
        return did_you_mean(word, known) if word and word not in known else ""


def is_drafted(words: Sequence[str]) -> bool:
    """Whether words of the command line name a model and data in place of a recipe."""
    names = ("--model", "--model.name_or_path", "--data", "--data.train")
    is_named = any(word.partition("=")[0] in names for word in words)
    return is_named and words[0].startswith("--")


def add_inspect_options(parser: Parser) -> None:
    """Those of ``hf-clm inspect``; the others are overrides of the recipe."""
    parser.add_argument("target", help="a recipe, or a run's folder")
    parser.add_argument("--rows", type=at_least(0), default=5, help="rows to print (%(default)s)")
    parser.add_argument("--html", nargs="?", const="labels.html", help="also write a page (%(const)s)")
    parser.add_argument("--split", default="train", help="train, eval, or the name of a set (%(default)s)")
    parser.add_argument("--worst", action="store_true", help="look at all rows; those with flags first")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="(%(default)s)")


def add_doctor_options(parser: Parser) -> None:
    """Those of ``hf-clm doctor``."""
    parser.add_argument("recipe", nargs="?", help="may be left out with --plan")
    parser.add_argument("--no_measure", action="store_true", help="only estimate the memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plan",
        metavar="gpus=64,memory=80GB",
        help="what fits on these GPUs by arithmetic, and what to take; without a recipe, of models from 0.5B "
        "to 72B, with rows of 4,096 tokens unless length=TOKENS follows",
    )


def add_prepare_options(parser: Parser) -> None:
    """Those of ``hf-clm prepare``; the others are overrides of the recipe."""
    parser.add_argument("recipe")
    text = "make the blocks on all cores (local), or on a Ray cluster: auto, or its address"
    parser.add_argument("--ray", metavar="local|ADDRESS", help=text)


def add_generate_options(parser: Parser) -> None:
    """Those of ``hf-clm generate``."""
    add_run(parser)
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--input", default="", help="the input that belongs to an instruction")
    text = "offer these functions with --prompt: a JSON list, as OpenAI's API takes them"
    parser.add_argument("--tools", metavar="FILE", help=text)
    parser.add_argument("--file", help="prompts: a txt file with one a line, or records in the run's format")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the run's format"
    )
    text = "continue past the model's positions, rereading half of them"
    parser.add_argument("--slide", action="store_true", help=text)
    add_decoding_options(parser)
    add_setting(parser, "num_beams")
    text = "prompts at once; changes no answer (%(default)s)"
    parser.add_argument("--batch_size", type=at_least(1), default=16, help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")


def add_chat_options(parser: Parser) -> None:
    """Those of ``hf-clm chat``."""
    add_run(parser)
    parser.add_argument("--system", default="", help="what the conversation begins with; /system changes it")
    text = "offer these functions: a JSON list, as OpenAI's API takes them; /tool gives a result"
    parser.add_argument("--tools", metavar="FILE", help=text)
    add_decoding_options(parser)


def add_run(parser: Parser) -> None:
    """The model to use, and where."""
    parser.add_argument("run", help="a run's folder, any model folder, or a name on the Hub")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")


def add_decoding_options(parser: Parser) -> None:
    """All settings of ``Decoding`` but beams."""

    for name in [name for name in SETTINGS if name != "num_beams"]:
        add_setting(parser, name)
    parser.set_defaults(seed=0)
    add_model_settings(parser, "these options replace them one by one")


def add_setting(parser: Parser, name: str) -> None:
    """An option for a setting of ``Decoding``; it is None where it is not given."""

    def read(text: str) -> object:
        try:
            return getattr(update_decoding(Decoding(), {name: text}), name)
        except RecipeError as error:
            raise argparse.ArgumentTypeError(f"{error.what}, got {text}") from error

    help = (SETTINGS[name].description or "").rstrip(".")
    default = SETTINGS[name].default
    if "default" not in help and default != ():
        help += " (%(default)s)" if default is None else f" ({default:g})"
    if name == "stop":
        parser.add_argument("--stop", action="append", help=help)
    else:
        parser.add_argument(f"--{name}", type=read, help=help)


def add_model_settings(parser: Parser, rest: str) -> None:
    """The one flag that makes the settings of generation_config.json count."""
    text = (
        "begin with the sampling settings of the model's generation_config.json, which have no effect without"
    )
    parser.add_argument("--use_model_settings", action="store_true", help=f"{text} this; {rest}")


def add_evaluate_options(parser: Parser) -> None:
    """Those of ``hf-clm evaluate``."""
    add_run(parser)
    parser.add_argument("data", nargs="+", help="files, globs, folders, or datasets on the Hub")
    parser.add_argument("--format", choices=get_args(Format), help="of the data; default: told from the keys")
    text = "what counts as target; default: the run's own"
    parser.add_argument("--stage", choices=("pretrain", "sft"), help=text)
    parser.add_argument("--max_length", type=at_least(2), help="tokens in a row; default: the run's own")
    text = "rows at once; changes no figure (%(default)s)"
    parser.add_argument("--batch_size", type=at_least(1), default=8, help=text)
    parser.add_argument("--choices", help="yes,no: which of them is likeliest; of two the first is positive")
    text = "compare the sum of a choice's log-probabilities, or the mean a token (%(default)s)"
    parser.add_argument("--choices_by", choices=("sum", "mean"), default="sum", help=text)
    add_setting(parser, "max_new_tokens")
    answers = parser.add_mutually_exclusive_group()
    text = "also with choices; adds chrF and BLEU (extra eval), and prompt, target and answer to --json"
    answers.add_argument("--generate", action="store_true", help=text)
    answers.add_argument("--no_generate", action="store_true", help="leave out the generated answers")
    text = (
        "measure another model too, on the same rows: one of the same tokenizer, or base, which is the model "
    )
    text += "that the run began with (for adapters: without them)"
    parser.add_argument("--before", metavar="base|MODEL", help=text)
    text = "also write a page: the loss of each token, worst rows first"
    parser.add_argument("--html", metavar="FILE", help=text)
    parser.add_argument("--rows", type=at_least(1), default=20, help="rows on the page (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_serve_options(parser: Parser) -> None:
    """Those of ``hf-clm serve``."""
    add_run(parser)
    text = "address; others than this one need a key (%(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    text = "0 takes a free one (%(default)s)"
    parser.add_argument("--port", type=at_least(0, most=65535), default=8000, help=text)
    text = "required from every client; better in HF_CLM_API_KEY, which no list of processes shows"
    parser.add_argument("--api_key", help=text)
    add_model_settings(parser, "a request replaces them one by one")
    parser.add_argument("--name", help="of the model in the API; default: the folder's")
    text = "of a request; default: 4096, or what the model has positions for"
    parser.add_argument("--max_prompt_tokens", type=at_least(1), help=text)
    limits = {
        "max_new_tokens": (1024, "of an answer"),
        "max_body_bytes": (1_000_000, "of a request"),
        "max_waiting": (64, "requests in the queue; more get 429"),
        "batch_size": (8, "answers generated at once"),
    }
    for name, (default, text) in limits.items():
        parser.add_argument(f"--{name}", type=at_least(1), default=default, help=f"{text} (%(default)s)")
    text = "for answers under way at its end (%(default)s)"
    parser.add_argument("--grace_seconds", type=at_least(0.0), default=20.0, help=text)


def add_train_tokenizer_options(parser: Parser) -> None:
    """Those of ``hf-clm train-tokenizer``."""
    parser.add_argument("data", nargs="+", help="files, globs, folders, or datasets on the Hub")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    parser.add_argument("--kind", choices=get_args(TokenizerKind), default="bpe", help="(%(default)s)")
    parser.add_argument("--vocab_size", type=at_least(258), default=4096, help="tokens (%(default)s)")
    parser.add_argument(
        "--min_frequency", type=at_least(1), default=2, help="of a pair that is merged (%(default)s)"
    )
    parser.add_argument("--pad_token", default="<|pad|>", help="(%(default)s)")
    parser.add_argument("--format", choices=get_args(Format), help="of the data; default: told from the keys")


def at_least(least: float, *, most: float = math.inf) -> Callable[[str], float]:
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


def writable(name: str, option: str) -> Path:
    """The path of a file to write. Raises RecipeError now for one that could not be written after minutes."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        fix = "name a file in a folder that is there"
        raise RecipeError("cannot be written", where=option, got=name, fix=fix)
    return path

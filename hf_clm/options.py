"""The options of the commands, with one-line errors."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from hf_clm.errors import RecipeError, did_you_mean
from hf_clm.schema import Format, TokenizerKind

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """An argument parser that allows no abbreviations and raises RecipeError."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raises RecipeError, with the nearest option for an unknown one."""
        words = [word.strip(":,").partition("=")[0] for word in message.split() if word.startswith("--")]
        raise RecipeError(message + self._nearest(*words[:1]), where=self.prog)

    @property
    def names(self) -> list[str]:
        """The names of the options, without the dashes."""
        options = [option for action in self._actions for option in action.option_strings]
        return [option.removeprefix("--") for option in options if option.startswith("--")]

    def parse_with_overrides(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns the options, and the remaining words, which override values of the recipe.

        The recipe is empty if ``--model`` and ``--data`` replace it. Raises RecipeError for overrides before
        a recipe, as argparse would read their values as the recipe.
        """
        options, overrides = self.parse_known_args(["", *words] if is_drafted(words) else words)
        recipe = getattr(options, next(action.dest for action in self._actions if not action.option_strings))
        if overrides and (recipe is None or (recipe and words.index(overrides[0]) < words.index(recipe))):
            got = f"{overrides[0]}{self._nearest(overrides[0])}"
            fix = f"{self.prog} RECIPE [--key value ...]"
            raise RecipeError("overrides must follow the recipe", where=self.prog, got=got, fix=fix)
        return options, overrides

    def _nearest(self, word: str = "") -> str:
        options = [f"--{name}" for name in self.names]
        return did_you_mean(word, options) if word and word not in options else ""


def is_drafted(words: Sequence[str]) -> bool:
    """Returns whether the command line names a model and data instead of a recipe."""
    names = ("--model", "--model.name_or_path")
    is_named = any(word.partition("=")[0] in names for word in words)
    return is_named and words[0].startswith("--")


def add_inspect_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm inspect``. Other words override the recipe."""
    parser.add_argument("target", help="a recipe, or the folder of a run")
    parser.add_argument("--rows", type=at_least(0), default=5, help="number of rows to print (%(default)s)")
    parser.add_argument("--html", nargs="?", const="labels.html", help="also write an HTML page (%(const)s)")
    parser.add_argument(
        "--split", default="train", help="train, eval, or the name of an evaluation set (%(default)s)"
    )
    parser.add_argument(
        "--worst", action="store_true", help="check all rows, and show those with flags first"
    )
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="color the output (%(default)s)"
    )


def add_doctor_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm doctor``."""
    parser.add_argument("recipe", nargs="?", help="optional with --plan")
    parser.add_argument("--no_measure", action="store_true", help="estimate the memory without measuring it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plan",
        metavar="gpus=64,memory=80GB",
        help="calculate what fits on these GPUs, and recommend a setup; without a recipe, for models of 0.5B "
        "to 72B, with rows of 4,096 tokens unless length=TOKENS is added",
    )


def add_prepare_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm prepare``. Other words override the recipe."""
    parser.add_argument("recipe")
    text = "use Ray to prepare on all cores (local), or on a cluster: auto, or its address"
    parser.add_argument("--ray", metavar="local|ADDRESS", help=text)


def add_generate_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm generate``."""
    add_run(parser)
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument("--input", default="", help="the input for an instruction")
    text = "offer these functions with --prompt: a JSON list in OpenAI's format"
    parser.add_argument("--tools", metavar="FILE", help=text)
    parser.add_argument(
        "--file", help="prompts: a .txt file with one per line, or records in the run's format"
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt itself, without the run's format"
    )
    text = "generate beyond the model's positions, by rereading half of them"
    parser.add_argument("--slide", action="store_true", help=text)
    add_decoding_options(parser)
    add_setting(parser, "num_beams")
    text = "prompts per batch; does not affect the answers (%(default)s)"
    parser.add_argument("--batch_size", type=at_least(1), default=16, help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")


def add_chat_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm chat``."""
    add_run(parser)
    parser.add_argument("--system", default="", help="the system prompt; /system changes it")
    text = "offer these functions: a JSON list in OpenAI's format; /tool enters a result"
    parser.add_argument("--tools", metavar="FILE", help=text)
    add_decoding_options(parser)


def add_run(parser: Parser) -> None:
    """Adds the options for the model, its device and its dtype."""
    text = "the folder of a run or model, a GGUF file, or a model on the Hub"
    parser.add_argument("run", help=text)
    add_device(parser)
    text = (
        "dtype of the weights; default: bfloat16 on a GPU that computes in it, else float32; adapters of a "
    )
    text += "base in 4 bits use it by default, and with this option the base as it was published"
    parser.add_argument("--dtype", choices=DTYPES, help=text)


def add_device(parser: Parser) -> None:
    """Adds the option for the device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if available")


def add_decoding_options(parser: Parser) -> None:
    """Adds all settings of ``Decoding`` except beams."""
    from hf_clm.generation.decoding import SETTINGS

    for name in [name for name in SETTINGS if name != "num_beams"]:
        add_setting(parser, name)
    parser.set_defaults(seed=0)
    add_model_settings(parser, "these options override them")


def add_setting(parser: Parser, name: str) -> None:
    """Adds an option for a setting of ``Decoding``, which is None by default."""
    from hf_clm.generation.decoding import SETTINGS, Decoding, update_decoding

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
    """Adds the flag that applies the settings of generation_config.json."""
    text = f"apply the sampling settings in the model's generation_config.json; {rest}"
    parser.add_argument("--use_model_settings", action="store_true", help=text)


def add_evaluate_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm evaluate``."""
    add_run(parser)
    parser.add_argument("data", nargs="+", help="files, globs, folders, or datasets on the Hub")
    parser.add_argument(
        "--format", choices=get_args(Format), help="format of the data; default: detected from the keys"
    )
    text = "evaluate all tokens (pretrain) or targets (sft); default: that of the run"
    parser.add_argument("--stage", choices=("pretrain", "sft"), help=text)
    parser.add_argument("--max_length", type=at_least(2), help="tokens in a row; default: that of the run")
    text = "rows per batch; does not affect the results (%(default)s)"
    parser.add_argument("--batch_size", type=at_least(1), default=8, help=text)
    parser.add_argument(
        "--choices",
        help="find the most likely of these answers, such as yes,no; the first of two is positive",
    )
    text = "compare choices by the sum of their log-probabilities, or the mean per token (%(default)s)"
    parser.add_argument("--choices_by", choices=("sum", "mean"), default="sum", help=text)
    add_setting(parser, "max_new_tokens")
    answers = parser.add_mutually_exclusive_group()
    text = "generate answers even with --choices, and add chrF and BLEU (extra eval), and the texts to --json"
    answers.add_argument("--generate", action="store_true", help=text)
    answers.add_argument("--no_generate", action="store_true", help="do not generate answers")
    text = "also score the same rows with another model of the same tokenizer; base is the model that the "
    text += "run started from (for adapters: the model without them)"
    parser.add_argument("--before", metavar="base|MODEL", help=text)
    text = "also write an HTML page with the loss of each token, worst rows first"
    parser.add_argument("--html", metavar="FILE", help=text)
    parser.add_argument(
        "--rows", type=at_least(1), default=20, help="number of rows on the page (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_why_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm why``. Other words override places in the recipe, such as its data."""
    parser.add_argument("run", help="the folder of a run that saved checkpoints")
    asked = parser.add_mutually_exclusive_group(required=True)
    text = "rank the training rows that taught the answer to this prompt; may be repeated"
    asked.add_argument("--prompt", action="append", default=[], help=text)
    text = "show the loss and the gradient norm of each document of this step"
    asked.add_argument("--step", type=at_least(1), help=text)
    text = "train again from the last checkpoint before this record, without it"
    asked.add_argument("--without", metavar="FILE:LINE", help=text)
    text = "the answer to each --prompt, in their order; default: that of the model"
    parser.add_argument("--answer", action="append", default=[], help=text)
    text = (
        "number of records to prove for each prompt: each is left out in turn, and the run replayed; as many "
    )
    text += "random ones are left out for comparison; 0: only rank (%(default)s)"
    parser.add_argument("--prove", type=at_least(0), default=3, help=text)
    parser.add_argument("--until", type=at_least(1), metavar="STEP", help="replay only up to this step")
    parser.add_argument(
        "--html", metavar="FILE", help="the page to write; default: why.html, or step-N.html, in the run"
    )
    text = "the folder of the run --without a record; default: RUN-without-LINE"
    parser.add_argument("--output_dir", metavar="FOLDER", help=text)


def add_export_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm export``."""
    parser.add_argument("run", help="the folder of a run or model, or a model on the Hub")
    text = "gguf: a file for llama.cpp; ollama: the same, with a Modelfile; safetensors: a folder for vLLM, "
    text += "SGLang, TGI and transformers"
    parser.add_argument("--to", choices=("gguf", "ollama", "safetensors"), required=True, help=text)
    parser.add_argument("--output_dir", required=True, metavar="FOLDER", help="the folder to write")
    text = "round the weights of the GGUF file to 8 bits (%(default)s)"
    parser.add_argument("--quantize", choices=("none", "q8_0"), default="none", help=text)
    text = "dtype of the exported weights; default: float16 for GGUF, bfloat16 for safetensors"
    parser.add_argument("--dtype", choices=DTYPES, help=text)
    text = (
        "a checkout of llama.cpp, or the source package of llama-cpp-python; default: the variable LLAMA_CPP"
    )
    parser.add_argument("--llama_cpp", metavar="PATH", help=text)
    text = "files to take the prompts and targets from; default: the training data of the run"
    parser.add_argument("--data", nargs="+", metavar="FILE", default=[], help=text)
    parser.add_argument("--format", choices=get_args(Format), help="format of --data; default: detected")
    text = (
        "largest gap in log-probability (nats) between the exported model's best token and the run's token; "
    )
    text += "the loss may change by a tenth of it; default: 0.02, 0.15 in bfloat16 and 0.5 in q8_0"
    parser.add_argument("--tolerance", type=at_least(0.0), help=text)
    add_device(parser)


def add_serve_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm serve``."""
    add_run(parser)
    text = "address to listen on; other addresses require an API key (%(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    text = "0 selects a free port (%(default)s)"
    parser.add_argument("--port", type=at_least(0, most=65535), default=8000, help=text)
    text = "required from every client; the environment variable HF_CLM_API_KEY keeps it out of process lists"
    parser.add_argument("--api_key", help=text)
    add_model_settings(parser, "requests override them")
    parser.add_argument("--name", help="name of the model in the API; default: that of the folder")
    text = "maximum tokens of a prompt; default: 4096, or the positions of the model"
    parser.add_argument("--max_prompt_tokens", type=at_least(1), help=text)
    limits = {
        "max_new_tokens": (1024, "maximum tokens of an answer"),
        "max_body_bytes": (1_000_000, "maximum size of a request"),
        "max_waiting": (64, "maximum requests in the queue; others receive status 429"),
        "batch_size": (8, "answers to generate at the same time"),
    }
    for name, (default, text) in limits.items():
        parser.add_argument(f"--{name}", type=at_least(1), default=default, help=f"{text} (%(default)s)")
    text = "time to finish answers at shutdown (%(default)s)"
    parser.add_argument("--grace_seconds", type=at_least(0.0), default=20.0, help=text)


def add_train_tokenizer_options(parser: Parser) -> None:
    """Adds the options of ``hf-clm train-tokenizer``."""
    parser.add_argument("data", nargs="+", help="files, globs, folders, or datasets on the Hub")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    parser.add_argument(
        "--kind", choices=get_args(TokenizerKind), default="bpe", help="kind of tokenizer (%(default)s)"
    )
    parser.add_argument(
        "--vocab_size", type=at_least(258), default=4096, help="number of tokens (%(default)s)"
    )
    parser.add_argument(
        "--min_frequency", type=at_least(1), default=2, help="occurrences of a pair to merge it (%(default)s)"
    )
    parser.add_argument("--pad_token", default="<|pad|>", help="the pad token (%(default)s)")
    parser.add_argument(
        "--format", choices=get_args(Format), help="format of the data; default: detected from the keys"
    )


def at_least(least: float, *, most: float = math.inf) -> Callable[[str], float]:
    """Returns a parser for numbers of the type of ``least``, from ``least`` to ``most``."""
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
    """Returns the path of a file to write. Raises RecipeError if its folder does not exist."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        fix = "name a file in an existing folder"
        raise RecipeError("cannot be written", where=option, got=name, fix=fix)
    return path

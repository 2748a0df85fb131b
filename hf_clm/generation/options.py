"""The options of ``hf-clm chat`` and ``hf-clm serve``."""

from argparse import ArgumentParser
from collections.abc import Callable


def add_chat_options(parser: ArgumentParser, *, number: Callable[..., Callable[[str], float]]) -> None:
    """``number(least, most=...)`` reads a number of that range."""
    parser.add_argument("run", help="a run's folder, any model folder, or a name on the Hub")
    parser.add_argument("--system", default="", help="what the conversation begins with; /system changes it")
    parser.add_argument("--max_new_tokens", type=number(1), help="of an answer; default: 256, or what fits")
    parser.add_argument("--temperature", type=number(0.0), help="0 is greedy, the default")
    parser.add_argument("--top_k", type=number(1), help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top_p",
        type=number(0.0, most=1.0),
        help="sample among the likeliest tokens of this total probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")

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


def add_serve_options(parser: ArgumentParser, *, number: Callable[..., Callable[[str], float]]) -> None:
    """``number(least, most=...)`` reads a number of that range."""
    parser.add_argument("run", help="a run's folder, any model folder, or a name on the Hub")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; others than this one need a key (%(default)s)"
    )
    parser.add_argument(
        "--port", type=number(0, most=65535), default=8000, help="0 takes a free one (%(default)s)"
    )
    parser.add_argument(
        "--api_key", help="asked of every client; better in HF_CLM_API_KEY, which no list of processes shows"
    )
    parser.add_argument("--name", help="of the model in the API; default: the folder's")
    parser.add_argument(
        "--max_prompt_tokens",
        type=number(1),
        help="of a request; default: 4096, or what the model has positions for",
    )
    parser.add_argument("--max_new_tokens", type=number(1), default=1024, help="of a request (%(default)s)")
    parser.add_argument(
        "--max_body_bytes", type=number(1), default=1_000_000, help="of a request (%(default)s)"
    )
    parser.add_argument(
        "--max_waiting", type=number(1), default=64, help="requests in the queue; more get 429 (%(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=number(1), default=8, help="answers generated at once (%(default)s)"
    )
    parser.add_argument(
        "--grace_seconds",
        type=number(0.0),
        default=20.0,
        help="for answers under way at its end (%(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")

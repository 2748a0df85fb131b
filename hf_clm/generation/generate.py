"""Generates text: the prompt rendered as in training, stopped at the stop tokens of training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.datasets import unspelled
from hf_clm.data.label.labels import cut_chat, encode_prompts
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.read.formats import join_turn, to_prompt
from hf_clm.data.read.templating import to_template_words
from hf_clm.errors import RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.padding import Probe, probe
from hf_clm.generation.stream import Answer, search_answers, stream_answers
from hf_clm.model.attention import use_for_generation, use_for_training
from hf_clm.model.load import NEW_TOKENS, max_positions
from hf_clm.recipe.template import Template
from hf_clm.schema import Chat, Document, Example, Segment, whole_text
from hf_clm.text.tokenizer import find_unknown

GREEDY = Decoding()


@dataclass(frozen=True)
class Generated:
    """``text`` without the stop token; ``stopped`` says that the model gave one itself."""

    text: str
    tokens: int
    stopped: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompts: Sequence[Example | str],
    decoding: Decoding = GREEDY,
    slide: bool = False,
    batch_size: int = 16,
    rendering: LabelOptions | None = None,
    watch: Callable[[range], Iterable[int]] = iter,
) -> list[Generated]:
    """Continues each prompt; a string is taken as it is, an Example is rendered as in training.

    Args:
        decoding: how tokens are chosen, greedily by default; prompt number n draws by its seed + n.
        slide: go on past the model's positions, in stretches that each reread the last half of them.
        batch_size: prompts at once. A model whose answers depend on the batch answers one at a time, and
            searches beams without a cache.
        rendering: how prompts are rendered, as in training.
        watch: passes on the starts of the batches, and may show how far they are.

    Raises RecipeError for options that do not go together, and where prompt and new tokens exceed the model's
    positions; DataError for a prompt that the tokenizer cannot spell.
    """
    if slide and decoding.num_beams > 1:
        raise RecipeError("slide and num_beams exclude each other", where="generation options")
    examples = [to_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids = to_prompt_ids(examples, tokenizer, rendering or LabelOptions())
    asked = decoding.max_new_tokens
    answers = [
        Answer(
            own,
            decoding.of_prompt(number),
            max_new_tokens=(asked or NEW_TOKENS)
            if slide
            else fit_new_tokens(model, len(own), max_new_tokens=asked),
        )
        for number, own in enumerate(ids)
    ]
    is_simple = len(ids) == 1 and len(ids[0]) > 1 and decoding.num_beams == 1
    with answering(model):
        found = Probe(True, True) if is_simple else probe(model, tokenizer)
        order = sorted(answers, key=lambda answer: len(answer.prompt_ids))  # little padding
        size = batch_size if found.takes_batches else 1
        for start in watch(range(0, len(order), size)):
            batch = order[start : start + size]
            if decoding.num_beams > 1:
                _search(model, tokenizer, batch, with_cache=found.takes_batches)
            else:
                stream_answers(model, tokenizer, answers=batch, with_cache=found.takes_cache)
    return [Generated(answer.text, answer.tokens, answer.finish == "stop") for answer in answers]


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and with an attention that has a KV cache; afterwards the model is as it was."""
    was_training, attention = model.training, str(model.config._attn_implementation)
    model.eval()
    use_for_generation(model)
    try:
        yield
    finally:
        use_for_training(model, attention)
        model.train(was_training)


def to_text(text: str) -> Document:
    """A text that is continued as it is."""
    return Document([Segment(text, 1.0)])


def to_prompt_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, rendering: LabelOptions
) -> list[list[int]]:
    """The ids that the model continues, of each prompt; an empty one is the start token.

    Raises DataError for a prompt that the tokenizer cannot spell, and for tools that its template leaves out.
    """
    check_prompts(examples, tokenizer)
    return [ids or [start_id(tokenizer)] for ids in encode_prompts(examples, tokenizer, rendering)]


def start_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What a text begins after: the start token, or else the end of another text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert isinstance(start, int), "load_tokenizer requires an end token"
    return start


def to_fitting_prompt(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, *, rendering: LabelOptions, most: int | None
) -> tuple[list[int], Chat]:
    """The ids of a chat's prompt, and the chat that they are of.

    Where they are more than ``most``, the oldest turns after the system turn are left out, as many as must
    be. The last turn of the user stays, even if it does not fit.
    """

    def to_ids(part: Chat) -> list[int]:
        return to_prompt_ids([part], tokenizer, rendering)[0]

    def fits(part: Chat) -> bool:
        is_last = sum(message["role"] == "user" for message in part.messages) <= 1
        return is_last or len(to_ids(part)) <= (most or 0)

    ids = to_ids(chat)
    if most is None or len(ids) <= most:
        return ids, chat
    cut = cut_chat(chat, fits)
    return (to_ids(cut[1]), cut[1]) if cut else (ids, chat)


def prompt_room(model: PreTrainedModel, *, max_new_tokens: int | None) -> int | None:
    """The tokens that a prompt may have, so that an answer has positions left; None where there is no limit.

    An answer gets ``max_new_tokens``, but at most half of the positions; without it 256, or a quarter.
    """
    limit = max_positions(model.config)
    if limit is None:
        return None
    return limit - (
        min(NEW_TOKENS, limit // 4) if max_new_tokens is None else min(max_new_tokens, limit // 2)
    )


def to_prompt_example(
    text: str,
    format: str,
    *,
    input_text: str = "",
    template: Template | None = None,
    has_turns: bool = False,
) -> Example:
    """Plain text as a prompt of ``format``: an instruction, a user's turn, or the text itself.

    With a ``template`` the text is its first column, and ``input_text`` the second. ``has_turns``: the run
    learned turns of a chat, whatever format its records had.
    """
    if template is not None:
        return to_template_words(text, template, input_text=input_text)
    if has_turns or format in ("messages", "sharegpt"):
        return Chat([{"role": "user", "content": join_turn(text, input_text)}])
    if format == "instruct":
        return to_prompt({"instruct": text, "input": input_text}, format="instruct")
    if format == "alpaca":
        return to_prompt({"instruction": text, "input": input_text}, format="alpaca")
    return to_text(text)


def check_prompts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises DataError for the first prompt with a character that the tokenizer has no token for."""
    for number, example in enumerate(examples, start=1):
        if (found := find_unknown(whole_text(example), tokenizer)) is not None:
            raise unspelled(found, where=f"prompt {number}")


def fit_new_tokens(model: PreTrainedModel, prompt_tokens: int, *, max_new_tokens: int | None) -> int:
    """How many tokens to generate at most; by default as many as there is room for.

    Raises RecipeError where prompt and new tokens do not fit into the model's positions.
    """
    limit = max_positions(model.config)
    asked = max(1, max_new_tokens or 1)
    if limit is not None and prompt_tokens + asked > limit:
        raise RecipeError(
            f"the model has {limit} positions",
            got=f"a prompt of {prompt_tokens} tokens and max_new_tokens {asked}",
            fix="shorten the prompt or lower max_new_tokens; hf-clm generate --slide goes on past them",
        )
    return cap_new_tokens(model, prompt_tokens, max_new_tokens=max_new_tokens)


def cap_new_tokens(
    model: PreTrainedModel, prompt_tokens: int, *, max_new_tokens: int | None, fix: str = "shorten it"
) -> int:
    """How many tokens to generate at most: what is asked for, or 256, as far as there are positions.

    Raises RecipeError, with this ``fix``, for a prompt that leaves none.
    """
    limit, most = max_positions(model.config), NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if limit is None:
        return most
    if prompt_tokens >= limit:
        got = f"{prompt_tokens} tokens, and the model has {limit} positions"
        raise RecipeError("the text is too long to be answered", got=got, fix=fix)
    return min(most, limit - prompt_tokens)


def _search(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, answers: Sequence[Answer], *, with_cache: bool
) -> None:
    """Beams end together, and those that are sampled draw one after the other."""
    together = groupby(answers, key=lambda answer: (answer.max_new_tokens, answer.decoding))
    for _, group in together:
        search_answers(model, tokenizer, answers=list(group), with_cache=with_cache)

"""``hf-clm chat``: a conversation in the terminal, with the prompts and stop tokens of training."""

from argparse import Namespace
from collections.abc import Callable

from hf_clm.errors import DataError, RecipeError, UserError, did_you_mean
from hf_clm.generation.generate import fit_new_tokens, to_prompt_example, to_prompt_ids
from hf_clm.generation.load import LoadedRun, load_run
from hf_clm.generation.stream import Answer, Sampling, stream_answers, to_sampling
from hf_clm.schema import ChatExample, Example, Message, Role

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system": "TEXT: begin anew with this system message; without a text, with none",
    "/quit": "leave; so does the end of the input, or Ctrl-C twice",
}
NOTES = {
    "instruct": "this run learned single instructions: each line is one, and is answered alone",
    "alpaca": "this run learned single instructions: each line is one, and is answered alone",
}
CONTINUES = "this model learned no conversations: each text is continued as it is"


class Conversation:
    """What has been said: each answer is generated from all of it, or, without turns, from the last text."""

    def __init__(self, run: LoadedRun, sampling: Sampling, *, system: str, max_new_tokens: int | None):
        self.run, self.sampling, self.max_new_tokens = run, sampling, max_new_tokens
        self.messages: list[Message] = []
        self.begin(system)

    def begin(self, system: str) -> None:
        """Forgets everything. Raises RecipeError for a system message where there are no turns."""
        if system and not self.run.has_turns:
            fix = "leave it out, or put it into the text"
            raise RecipeError(f"a run of format {self.run.format} has no system message", fix=fix)
        self._system: list[Message] = [_message("system", system)] if system else []
        self.messages = list(self._system)

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = list(self._system)

    def answer(self, text: str, emit: Callable[[str], None]) -> Answer:
        """Answers ``text``; Ctrl-C ends the answer where it is. Raises UserError for a prompt it refuses."""
        run, turns = self.run, [*self.messages, _message("user", text)]
        prompt: Example = ChatExample(turns)
        if not run.has_turns:
            prompt = to_prompt_example(text, run.format, template=run.template)
        ids = to_prompt_ids([prompt], run.tokenizer, special_tokens_in_text=run.special_tokens_in_text)[0]
        room = fit_new_tokens(run.model, len(ids), max_new_tokens=self.max_new_tokens)
        answer = Answer(ids, self.sampling, max_new_tokens=room, emit=emit)
        try:
            stream_answers(run.model, run.tokenizer, answers=[answer])
        except KeyboardInterrupt:
            answer.is_cancelled = True
        if answer.text.strip() and run.has_turns:  # a turn without a word is in no training set
            self.messages = [*turns, _message("assistant", answer.text)]
        return answer


def chat(options: Namespace, *, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Reads a text, writes its answer, until the texts end: ``read`` raises EOFError then.

    A line that ends in a backslash goes on in the next one.
    """
    sampling = to_sampling(options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    run = load_run(options.run, attention="sdpa", device=options.device)
    talk = Conversation(run, sampling, system=options.system, max_new_tokens=options.max_new_tokens)
    if not run.has_turns:
        write(f"({NOTES.get(run.format, CONTINUES)})\n")
    was_interrupted = False
    while True:
        try:
            text = _read_text(read)
        except EOFError:
            return
        except KeyboardInterrupt:
            if was_interrupted:
                return
            write("\n(Ctrl-C again, or /quit, leaves)\n")
            was_interrupted = True
            continue
        if text.strip() == "/quit":
            return
        was_interrupted = _reply(talk, text, write=write)


def _read_text(read: Callable[[], str]) -> str:
    text = read()
    while text.endswith("\\"):
        text = text[:-1] + "\n" + read()
    return text


def check_unicode(text: str) -> None:
    """Raises DataError for a text with half a character (a surrogate), which no tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError("the text is not UTF-8", got=repr(text[:40]))


def _reply(talk: Conversation, text: str, *, write: Callable[[str], None]) -> bool:
    """Does what a command says, or answers; True where Ctrl-C ended the answer."""
    try:
        if text.startswith("/"):
            write(_command(talk, text) + "\n")
        elif text.strip():
            check_unicode(text)
            answer = talk.answer(text, write)
            ends = {"length": "\n(cut: --max_new_tokens allows more)\n", "": "\n(stopped)\n"}
            write(ends.get(answer.finish, "\n"))
            return answer.is_cancelled
    except UserError as error:
        write(f"error: {error}\n")
    return False


def _command(talk: Conversation, line: str) -> str:
    """Runs a command and says what it did. Raises RecipeError for one that does not exist."""
    word, _, rest = line.strip().partition(" ")
    if word == "/help":
        return "\n".join(f"{name:<8} {help}" for name, help in COMMANDS.items())
    if word == "/reset":
        talk.reset()
        return "(the conversation is forgotten)"
    if word == "/system":
        talk.begin(rest.strip())
        return "(begun anew with this system message)" if rest.strip() else "(begun anew without one)"
    fix = f"one of {', '.join(COMMANDS)}{did_you_mean(word, COMMANDS)}; a text may begin with a space and /"
    raise RecipeError("no such command", got=repr(word), fix=fix)


def _message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}

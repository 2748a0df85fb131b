"""``hf-clm chat``: a conversation in the terminal, with the prompts and stop tokens of training."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import takewhile

from hf_clm.errors import DataError, RecipeError, UserError, did_you_mean
from hf_clm.generation.decoding import Decoding, ask
from hf_clm.generation.load import LoadedRun, load_run
from hf_clm.generation.padding import probe
from hf_clm.generation.parsing import AnswerReader, find_syntax
from hf_clm.generation.prompts import (
    cap_new_tokens,
    prompt_room,
    read_tools,
    to_fitting_prompt,
    to_prompt_example,
    to_prompt_ids,
)
from hf_clm.generation.sampling import base_decoding
from hf_clm.generation.stream import Answer, stream_answers
from hf_clm.model.load import max_positions
from hf_clm.schema import Chat, Json, Message, Role, ToolCall

Write = Callable[[str], None]
COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system": "TEXT: begin anew with this system message; without a text, with none",
    "/tool": "TEXT: the result of the function that was called",
    "/quit": "leave; so does the end of the input, or Ctrl-C twice",
}
NOTES = {
    "instruct": "this run learned single instructions: each line is one, and is answered alone",
    "alpaca": "this run learned single instructions: each line is one, and is answered alone",
}
CONTINUES = "this model learned no conversations: each text is continued as it is"


class Conversation:
    """What has been said: each answer is generated from all of it, or, without turns, from the last text.

    Raises RecipeError for a system message or tools where there are no turns.
    """

    def __init__(
        self,
        run: LoadedRun,
        decoding: Decoding,
        *,
        system: str,
        tools: Sequence[dict[str, Json]] = (),
    ):
        if tools and not run.has_turns:
            fix = "leave them out"
            raise RecipeError(f"a run of format {run.format} takes no tools", where="--tools", fix=fix)
        self.run, self.decoding, self.tools = run, decoding, list(tools)
        self._syntax = find_syntax(run.tokenizer)
        self._with_cache = probe(run.model, run.tokenizer).takes_cache
        self.begin(system)

    def begin(self, system: str) -> None:
        """Forgets everything. Raises RecipeError for a system message where there are no turns."""
        if system and not self.run.has_turns:
            fix = "leave it out, or put it into the text"
            raise RecipeError(f"a run of format {self.run.format} has no system message", fix=fix)
        self.system = system
        self.messages = [_message("system", system)] if system else []

    def answer(self, text: str, write: Write) -> Answer:
        """Answers ``text``; Ctrl-C ends the answer where it is. Raises UserError for a prompt it refuses."""
        if self.run.has_turns:
            return self._continue([*self.messages, _message("user", text)], write)
        prompt = to_prompt_example(text, self.run.format, template=self.run.template)
        ids = to_prompt_ids([prompt], self.run.tokenizer, self.run.rendering)[0]
        return self._generate(ids, write)

    def take_result(self, text: str, write: Write) -> Answer | None:
        """Takes the result of the first call that has none; answers when it was the last one.

        Raises RecipeError where no call waits for a result.
        """
        calls = self._open_calls
        if not calls:
            raise RecipeError("no function was called", fix="ask something, with --tools FILE")
        result: Message = {"role": "tool", "content": text, "name": str(calls[0]["function"]["name"])}
        if "id" in calls[0]:
            result["tool_call_id"] = calls[0]["id"]
        if len(calls) == 1:
            return self._continue([*self.messages, result], write)
        self.messages.append(result)
        write(f"(now the result of {calls[1]['function']['name']})\n")
        return None

    @property
    def _open_calls(self) -> list[ToolCall]:
        """The calls of the last answer that have no result yet."""
        results = len(list(takewhile(lambda message: message["role"] == "tool", reversed(self.messages))))
        before = self.messages[: len(self.messages) - results]
        return before[-1].get("tool_calls", [])[results:] if before else []

    def _continue(self, turns: list[Message], write: Write) -> Answer:
        """Generates the next turn. Where there is no room for all of them, the oldest are forgotten."""
        run = self.run
        most = prompt_room(run.model, max_new_tokens=self.decoding.max_new_tokens)
        chat = Chat(turns, self.tools)
        ids, chat = to_fitting_prompt(chat, run.tokenizer, rendering=run.rendering, most=most)
        dropped = len(turns) - len(chat.messages)
        note = f"(no room for the whole conversation: its oldest messages ({dropped}) are forgotten)\n"
        answer = self._generate(ids, write, note=note if dropped else "")
        if answer.text.strip():  # a turn without a word is in no training set
            prompt = str(run.tokenizer.decode(ids))
            reader = AnswerReader(run.tokenizer, self._syntax, prompt=prompt, tools=self.tools)
            reader.feed(answer.text)
            reader.finish()
            self.messages = [*chat.messages, reader.message]
        return answer

    def _generate(self, ids: list[int], write: Write, *, note: str = "") -> Answer:
        """Writes the note and the answer. Raises RecipeError for a prompt that leaves no room."""
        run, asked = self.run, self.decoding.max_new_tokens
        fix = "shorten it, or the system message: /system TEXT" if self.system else "shorten it"
        room = cap_new_tokens(run.model, len(ids), max_new_tokens=asked, fix=fix)
        write(note)
        answer = Answer(ids, self.decoding, room, hidden_ids=self._syntax.hidden_ids, emit=write)
        try:
            stream_answers(run.model, run.tokenizer, answers=[answer], with_cache=self._with_cache)
        except KeyboardInterrupt:
            answer.is_cancelled = True
        return answer


def chat(options: Namespace, *, read: Callable[[], str], write: Write) -> None:
    """Reads a text, writes its answer, until the texts end: ``read`` raises EOFError then.

    A line that ends in a backslash continues in the next one.
    """
    base = base_decoding(options.run, use_model_settings=options.use_model_settings)
    decoding = ask(base, vars(options))
    tools = read_tools(options.tools) if options.tools else []
    run = load_run(options.run, attention=None, device=options.device)
    talk = Conversation(run, decoding, system=options.system, tools=tools)
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
        answer = _reply(talk, text, write=write)
        was_interrupted = answer is not None and answer.is_cancelled


def _read_text(read: Callable[[], str]) -> str:
    text = read()
    while text.endswith("\\"):
        text = text[:-1] + "\n" + read()
    return text


def _reply(talk: Conversation, text: str, *, write: Write) -> Answer | None:
    """Does what a command says, or answers; then says where an answer was cut."""
    word, _, rest = text.partition(" ")
    answer = None
    try:
        if any(
            "\ud800" <= letter <= "\udfff" for letter in text
        ):  # half a character, which no tokenizer takes
            raise DataError("the text is not UTF-8", got=repr(text[:40]))
        if word == "/tool":
            answer = talk.take_result(rest, write)
        elif text.startswith("/"):
            write(_command(talk, word.strip(), rest.strip()) + "\n")
        elif text.strip():
            answer = talk.answer(text, write)
    except UserError as error:
        write(f"error: {error}\n")
    if answer:
        is_full = len(answer.prompt_ids) + len(answer.ids) == max_positions(talk.run.model.config)
        cut = (
            "the model has no positions left; /reset begins anew"
            if is_full
            else "--max_new_tokens allows more"
        )
        write({"length": f"\n(cut: {cut})\n", "": "\n(stopped)\n"}.get(answer.finish, "\n"))
    return answer


def _command(talk: Conversation, word: str, rest: str) -> str:
    """Runs a command and says what it did. Raises RecipeError for one that does not exist."""
    if word == "/help":
        return "\n".join(f"{name:<8} {help}" for name, help in COMMANDS.items())
    if word == "/reset":
        talk.begin(talk.system)
        return "(the conversation is forgotten)"
    if word == "/system":
        talk.begin(rest)
        return "(begun anew with this system message)" if rest else "(begun anew without one)"
    fix = f"one of {', '.join(COMMANDS)}{did_you_mean(word, COMMANDS)}; a text may begin with a space and /"
    raise RecipeError("no such command", got=repr(word), fix=fix)


def _message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}

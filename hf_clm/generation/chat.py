"""``hf-clm chat``: a conversation in the terminal, with the prompt format and stop tokens of training."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import takewhile

from hf_clm.errors import DataError, RecipeError, UserError, did_you_mean
from hf_clm.generation.decoding import Decoding, update_decoding
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
CHAT_COMMANDS = {
    "/help": "show this list",
    "/reset": "start a new conversation",
    "/system": "[TEXT]: start a new conversation with this system message, or without one",
    "/tool": "TEXT: give the result of the tool call",
    "/quit": "quit (also Ctrl-D, or Ctrl-C twice)",
}
INSTRUCTION_NOTE = "this run was trained on single instructions: each line is answered on its own"
NOTES = {"instruct": INSTRUCTION_NOTE, "alpaca": INSTRUCTION_NOTE}
CONTINUATION_NOTE = "this model was not trained on conversations: it continues each text you enter"


class Conversation:
    """A conversation with a model. Without turns (``run.has_turns``), each text is answered on its own.

    Raises RecipeError for a system message or tools if the run has no turns.
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
            what = f"a run of format {run.format} does not support tools"
            raise RecipeError(what, where="--tools", fix="remove the option")
        self.run, self.decoding, self.tools = run, decoding, list(tools)
        self._syntax = find_syntax(run.tokenizer)
        self._with_cache = probe(run.model, run.tokenizer).takes_cache
        self.start(system)

    def start(self, system: str) -> None:
        """Starts a new conversation. Raises RecipeError for a system message if the run has no turns."""
        if system and not self.run.has_turns:
            fix = "leave it out, or write it at the start of your text"
            raise RecipeError(f"a run of format {self.run.format} does not support system messages", fix=fix)
        self.system = system
        self.messages = [_message("system", system)] if system else []

    def answer(self, text: str, write: Write) -> Answer:
        """Answers ``text``; Ctrl-C stops the answer. Raises UserError if the prompt cannot be answered."""
        if self.run.has_turns:
            return self._continue([*self.messages, _message("user", text)], write)
        prompt = to_prompt_example(text, self.run.format, template=self.run.template)
        ids = to_prompt_ids([prompt], self.run.tokenizer, self.run.rendering)[0]
        return self._generate(ids, write)

    def take_result(self, text: str, write: Write) -> Answer | None:
        """Adds the result of the next open tool call; answers if it was the last one.

        Raises RecipeError if no call is open.
        """
        calls = self._open_calls
        if not calls:
            raise RecipeError(
                "there is no tool call to give a result for",
                fix="start chat with --tools FILE",
            )
        result: Message = {"role": "tool", "content": text, "name": str(calls[0]["function"]["name"])}
        if "id" in calls[0]:
            result["tool_call_id"] = calls[0]["id"]
        if len(calls) == 1:
            return self._continue([*self.messages, result], write)
        self.messages.append(result)
        write(f"(next, give the result of {calls[1]['function']['name']})\n")
        return None

    @property
    def _open_calls(self) -> list[ToolCall]:
        """The tool calls of the last answer that have no result yet."""
        results = len(list(takewhile(lambda message: message["role"] == "tool", reversed(self.messages))))
        before = self.messages[: len(self.messages) - results]
        return before[-1].get("tool_calls", [])[results:] if before else []

    def _continue(self, turns: list[Message], write: Write) -> Answer:
        """Generates the next turn. Drops the oldest turns if they do not all fit."""
        run = self.run
        most = prompt_room(run.model, max_new_tokens=self.decoding.max_new_tokens)
        chat = Chat(turns, self.tools)
        ids, chat = to_fitting_prompt(chat, run.tokenizer, rendering=run.rendering, most=most)
        dropped = len(turns) - len(chat.messages)
        note = f"(the conversation is too long: dropped the oldest messages ({dropped}))\n"
        answer = self._generate(ids, write, note=note if dropped else "")
        if answer.text.strip():  # training data has no empty turns
            prompt = str(run.tokenizer.decode(ids))
            reader = AnswerReader(run.tokenizer, self._syntax, prompt=prompt, tools=self.tools)
            reader.feed(answer.text)
            reader.finish()
            self.messages = [*chat.messages, reader.message]
        return answer

    def _generate(self, ids: list[int], write: Write, *, note: str = "") -> Answer:
        """Writes the note and the answer. Raises RecipeError if the prompt leaves no room for an answer."""
        run = self.run
        fix = "shorten it, or the system message (/system TEXT)" if self.system else "shorten it"
        room = cap_new_tokens(run.model, len(ids), max_new_tokens=self.decoding.max_new_tokens, fix=fix)
        write(note)
        answer = Answer(ids, self.decoding, room, hidden_ids=self._syntax.hidden_ids, emit=write)
        try:
            stream_answers(run.model, run.tokenizer, answers=[answer], with_cache=self._with_cache)
        except KeyboardInterrupt:
            answer.is_cancelled = True
        return answer


def chat(options: Namespace, *, read: Callable[[], str], write: Write) -> None:
    """Answers each text from ``read`` until ``read`` raises EOFError or the user quits.

    A line that ends in a backslash continues on the next line.
    """
    base = base_decoding(options.run, use_model_settings=options.use_model_settings)
    decoding = update_decoding(base, vars(options))
    tools = read_tools(options.tools) if options.tools else []
    run = load_run(options.run, attention=None, device=options.device, dtype=options.dtype)
    talk = Conversation(run, decoding, system=options.system, tools=tools)
    if not run.has_turns:
        write(f"({NOTES.get(run.format, CONTINUATION_NOTE)})\n")
    was_interrupted = False
    while True:
        try:
            text = _read_text(read)
        except EOFError:
            return
        except KeyboardInterrupt:
            if was_interrupted:
                return
            write("\n(press Ctrl-C again or type /quit to quit)\n")
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
    """Runs a command or answers a text; then reports whether the answer was cut off."""
    word, _, rest = text.partition(" ")
    answer = None
    try:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # surrogates, which tokenizers reject
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
        reason = (
            "the model's maximum length is reached; /reset starts a new conversation"
            if is_full
            else "--max_new_tokens is reached"
        )
        write({"length": f"\n(cut off: {reason})\n", "": "\n(stopped)\n"}.get(answer.finish, "\n"))
    return answer


def _command(talk: Conversation, word: str, rest: str) -> str:
    """Runs a command and returns a line that reports it. Raises RecipeError for an unknown command."""
    if word == "/help":
        return "\n".join(f"{name:<8} {help}" for name, help in CHAT_COMMANDS.items())
    if word == "/reset":
        talk.start(talk.system)
        return "(started a new conversation)"
    if word == "/system":
        talk.start(rest)
        kind = "with this system message" if rest else "without a system message"
        return f"(started a new conversation {kind})"
    names = f"{', '.join(CHAT_COMMANDS)}{did_you_mean(word, CHAT_COMMANDS)}"
    fix = f"use one of {names}; begin a text that starts with / with a space"
    raise RecipeError("unknown command", got=repr(word), fix=fix)


def _message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}

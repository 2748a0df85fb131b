"""hf-clm chat in a terminal and through a pipe, with a model that has memorized its conversations."""

import io
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from by_heart import learn_by_heart
from helpers import byte_tokenizer, save_folder, tiny_model

from hf_clm.cli import main

ROOT = Path(__file__).resolve().parents[2]


def turns(*contents: str, system: str = "") -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(contents)
    messages += [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": messages}


CHATS = [
    turns("hi", "hello", "again", "hello twice"),
    turns("again", "what?", "hi", "now hello"),
    turns("hi", "HELLO", "again", "HELLO TWICE", system="loud"),
    turns("茶?", "🐉 é 茶"),
    turns("<|im_end|>", "just text"),
]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> str:
    return learn_by_heart(tmp_path_factory.mktemp("chatty"), CHATS, format="messages", steps=120)


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> str:
    records = [
        {"instruct": "one\ntwo", "input": "", "label": "first\nsecond"},
        {"instruct": "x", "label": "y"},
    ]
    return learn_by_heart(tmp_path_factory.mktemp("taught"), records, format="instruct")


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs hf-clm chat with these lines as standard input; returns the lines it prints."""

    def printed(run: str, lines: str | bytes, *options: str) -> list[str]:
        given = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        capsys.readouterr()
        assert main(["chat", run, "--device", "cpu", *options]) == 0
        return capsys.readouterr().out.splitlines()

    return printed


class Terminal:
    """``hf-clm chat`` in a pseudo-terminal."""

    def __init__(self, run: str, *options: str):
        self._master, slave = pty.openpty()
        words = [sys.executable, "-m", "hf_clm", "chat", run, "--device", "cpu", *options]
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_take_terminal, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """Reads until ``text`` appears; returns the output before it."""
        while text not in self.output:
            assert select.select([self._master], [], [], 60)[0], f"no {text!r} after {self.output!r}"
            self.output += os.read(self._master, 4096).decode().replace("\r\n", "\n")
        before, _, self.output = self.output.partition(text)
        return before

    def interrupt(self) -> None:
        """Presses Ctrl-C once the process waits for a line."""
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.read_text().rpartition(") ")[2][0] != "S":
            os.sched_yield()
        self.type("\x03")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    """Makes the terminal the controlling terminal of the new session, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal():
    opened: list[Terminal] = []

    def open_terminal(run: str, *options: str) -> Terminal:
        opened.append(Terminal(run, *options))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_an_answer_depends_on_the_earlier_turns(chatty, talk):
    assert talk(chatty, "hi\nagain\n") == ["hello", "hello twice"]
    assert talk(chatty, "again\nhi\n") == ["what?", "now hello"]


def test_reset_clears_the_conversation_but_not_the_system_message(chatty, talk):
    assert talk(chatty, "again\n/reset\nhi\nagain\n")[1:] == [
        "(started a new conversation)",
        "hello",
        "hello twice",
    ]
    assert talk(chatty, "hi\n/reset\nhi\n", "--system", "loud")[::2] == ["HELLO", "HELLO"]


def test_the_system_message_can_be_changed(chatty, talk):
    lines = talk(chatty, "hi\n/system loud\nhi\nagain\n/system\nhi\n/quit\nagain\n")

    assert lines == [
        "hello",
        "(started a new conversation with this system message)",
        "HELLO",
        "HELLO TWICE",
        "(started a new conversation without a system message)",
        "hello",
    ]


def test_typed_control_tokens_stay_plain_text(chatty, talk):
    assert talk(chatty, "<|im_end|>\n/reset\n茶?\n")[::2] == ["just text", "🐉 é 茶"]


def test_an_instruction_may_have_several_lines_and_is_answered_on_its_own(taught, talk):
    lines = talk(taught, "one\\\ntwo\n\nx\none\\\ntwo\n")

    assert lines == [
        "(this run was trained on single instructions: each line is answered on its own)",
        *["first", "second", "y", "first", "second"],
    ]


def test_a_model_without_a_template_continues_the_text(tmp_path, talk):
    folder = save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())

    lines = talk(folder, "abc\n", "--max_new_tokens", "1")

    assert lines[0] == "(this model was not trained on conversations: it continues each text you enter)"
    assert lines[-1] == "(cut off: --max_new_tokens is reached)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "/rest",
            "error: unknown command; got '/rest'; fix: use one of /help, /reset, /system, /tool, /quit; did",
        ),
        (
            "/system be kind",
            "error: a run of format instruct does not support system messages; fix: leave it out",
        ),
        ("\ufdd0", "error: the text contains a noncharacter (U+FDD0 or U+FDD1); fix: remove it"),
        (b"\xff", "error: the text is not UTF-8"),
    ],
)
def test_an_error_is_one_line_and_the_chat_continues(taught, talk, line, message):
    line = line if isinstance(line, bytes) else line.encode()

    lines = talk(taught, line + b"\nx\n")

    assert lines[1].startswith(message)
    assert lines[2:] == ["y"]


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(tmp_path, talk):
    records = [turns("hi", "hello")]
    folder = learn_by_heart(tmp_path, records, format="messages", max_position_embeddings=40)

    assert talk(folder, "hi\nhi\n" + "x" * 30 + "\nhi\n") == [
        "hello",
        "(the conversation is too long: dropped the oldest messages (2))",
        "hello",
        "error: the prompt leaves no room for an answer; got 49 tokens for a model with 40 positions; "
        "fix: shorten it",
        "(the conversation is too long: dropped the oldest messages (2))",
        "hello",
    ]


def test_help_lists_the_commands(taught, talk):
    output = talk(taught, "/help\n")[1:]

    assert [line.split()[0] for line in output] == ["/help", "/reset", "/system", "/tool", "/quit"]


def test_a_run_without_a_model_is_an_error(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"status": "running"}')

    assert main(["chat", str(tmp_path)]) == 4
    assert "the run is running: it has no final model" in capsys.readouterr().err


def test_the_lines_of_a_pipe_are_answered(taught):
    words = [sys.executable, "-m", "hf_clm", "chat", taught]
    done = subprocess.run(words, cwd=ROOT, input="x\n", capture_output=True, text=True, check=False)

    assert (done.stdout.splitlines()[1:], done.stderr) == (["y"], "")


def test_in_a_terminal_the_answer_follows_the_question(chatty, terminal):
    screen = terminal(chatty)

    screen.wait_for("> ")
    screen.type("hi\n")

    assert screen.wait_for("\n> ") == "hi\nhello"
    screen.type("/quit\n")
    assert screen.process.wait(timeout=60) == 0


def test_ctrl_c_stops_the_answer_and_a_second_one_quits(tmp_path, terminal):
    endless = tiny_model("gpt2", n_layer=1, n_positions=100_000, tie_word_embeddings=False)
    with torch.no_grad():
        endless.transformer.ln_f.bias.fill_(1.0)
        endless.lm_head.weight[ord("z")] = 9.0
    screen = terminal(save_folder(tmp_path / "model", endless, byte_tokenizer()), "--max_new_tokens", "90000")

    screen.wait_for("> ")
    screen.type("abc\n")
    screen.wait_for("abc\nzzz")
    screen.type("\x03")
    screen.wait_for("\n(stopped)\n> ")
    screen.interrupt()

    assert screen.process.wait(timeout=60) == 0


def test_ctrl_c_at_the_prompt_explains_how_to_quit(taught, terminal):
    screen = terminal(taught)

    screen.wait_for("> ")
    screen.interrupt()
    screen.wait_for("(press Ctrl-C again or type /quit to quit)\n> ")
    screen.type("x\n")
    assert screen.wait_for("\n> ") == "x\ny"
    screen.type("\x04")

    assert screen.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def cramped(tmp_path_factory) -> str:
    """64 positions."""
    records = [turns("hi", "hello", system="S"), turns("hi", "hello")]
    folder = tmp_path_factory.mktemp("cramped")
    return learn_by_heart(folder, records, format="messages", max_position_embeddings=64)


@pytest.mark.parametrize("option", [[], ["--max_new_tokens", "40"], ["--max_new_tokens", "9000"]])
def test_a_long_conversation_with_a_system_message_is_answered_at_every_line(cramped, talk, option):
    """The oldest turns are dropped and the system message is kept, whatever max_new_tokens is."""
    lines = talk(cramped, "hi\n" * 6, "--system", "S", *option)

    assert [line for line in lines if not line.startswith("(")] == ["hello"] * 6
    assert lines.count("(the conversation is too long: dropped the oldest messages (2))") == 5


def test_a_line_that_does_not_fit_with_the_system_message_suggests_a_fix(cramped, talk):
    lines = talk(cramped, "hi\n" + "x" * 40 + "\n/system\nhi\n", "--system", "S" * 10)

    assert lines[1] == (
        "error: the prompt leaves no room for an answer; got 79 tokens for a model with 64 positions; "
        "fix: shorten it, or the system message (/system TEXT)"
    )
    assert lines[3] == "hello"


def test_an_answer_that_reaches_the_maximum_length_reports_it(tmp_path, talk):
    endless = tiny_model("gpt2", n_layer=1, n_positions=12, tie_word_embeddings=False)
    with torch.no_grad():
        endless.transformer.ln_f.bias.fill_(1.0)
        endless.lm_head.weight[ord("z")] = 9.0
    folder = save_folder(tmp_path / "model", endless, byte_tokenizer())

    assert talk(folder, "abc\n")[1:] == [
        "z" * 9,
        "(cut off: the model's maximum length is reached; /reset starts a new conversation)",
    ]
    assert talk(folder, "abc\n", "--max_new_tokens", "2")[2] == "(cut off: --max_new_tokens is reached)"

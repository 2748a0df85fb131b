"""The templates of Modelfiles, executed by Go as in Ollama, against the run's own in transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ollama_templates import TEMPLATES, with_template

from hf_clm.data.read.plain_template import plain_template
from hf_clm.export.ollama import ALONE, CONVERSATIONS, find_default_system, find_shape, render, with_default

GO = shutil.which("go", path=str(Path(sys.executable).parent)) or shutil.which("go")
pytestmark = [pytest.mark.peer, pytest.mark.skipif(GO is None, reason="Go is not installed")]

PROGRAM = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Messages []*Message }

func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    var texts []string
    for _, one := range cases {
        var text strings.Builder
        parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
        err := parsed.Execute(&text, map[string]any{"Messages": one.Messages, "Response": ""})
        if err != nil { panic(err) }
        texts = append(texts, text.String())
    }
    json.NewEncoder(os.Stdout).Encode(texts)
}
"""
ALL = {
    **TEMPLATES,
    **{name: str(plain_template(name, None, starts=False)) for name in ("alpaca", "instruct")},
}


def execute(cases: list[dict[str, Any]], folder: Path) -> list[str]:
    """Executes templates of Go; each case has a ``Template`` and ``Messages``."""
    (folder / "main.go").write_text(PROGRAM)
    environment = {
        "HOME": str(folder),
        "PATH": "/usr/bin:/bin",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-mod=mod",
    }
    words = [str(GO), "run", str(folder / "main.go")]
    done = subprocess.run(words, input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_go_writes_what_the_template_of_the_run_writes(tmp_path):
    cases, expected = [], []
    for template in ALL.values():
        tokenizer = with_template(template)
        default = find_default_system(tokenizer)
        start = str(tokenizer.bos_token) if "bos_token" in template else ""
        shape = find_shape(tokenizer, default=default, start=start)
        assert shape is not None
        for messages in CONVERSATIONS:
            own = render(tokenizer, messages)
            if own is None:  # refused by the template of the run
                continue
            messages = [{"Role": m["role"], "Content": m["content"]} for m in with_default(messages, default)]
            cases.append({"Template": shape.go, "Messages": messages})
            expected.append(own.removeprefix(start))

    found = execute(cases, tmp_path)

    assert len(cases) > 25
    assert found == expected


def test_a_text_with_braces_and_quotes_is_written_as_it_is(tmp_path):
    one_question = "{% if messages[1:] %}{{ raise_exception('') }}{% endif %}"
    tokenizer = with_template("{{ 'Say {{\"' + messages[0].content + '\"}} \\\\n `x`' }}" + one_question)
    shape = find_shape(tokenizer)
    assert shape is not None
    messages = [{"Role": "user", "Content": ALONE[0]["content"]}]

    (found,) = execute([{"Template": shape.go, "Messages": messages}], tmp_path)

    assert found == render(tokenizer, ALONE)

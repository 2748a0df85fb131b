"""data/build_corpus.py on small source trees, and once on the Python that runs the tests."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "data" / "build_corpus.py"


def load_script():
    spec = importlib.util.spec_from_file_location("build_corpus", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_corpus = load_script()

SHAPES = '''
"""Shapes.

Flat ones only.
"""
raise RuntimeError("this module must never be imported")

class Circle(Shape):
    """A round 形.

        Indented, as "π" is.
    Not indented.
    """

    def area(self, *, digits: int = 2) -> float:
        """The area,
        rounded.

        Raises nothing.
        """

    class Edge:
        def length(self):
            """Its length."""

    def undocumented(self): ...

if True:
    async def draw(shape, *colours, **options):
        """Draws."""
        def inner(x="a  b"):
            """Inside."""

def area():
    """Draws."""
'''


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def parse(name: str, text: str):
    return build_corpus.parse_module(name, text.encode())


def test_modules_are_named_by_path_without_tests_and_installed_packages(tmp_path):
    wanted = ["a.py", "pkg/__init__.py", "pkg/deep/b.py", "notpkg/c.py"]
    unwanted = [
        "test/t.py",
        "pkg/tests/t.py",
        "idlelib/idle_test/t.py",
        "site-packages/pip/t.py",
        "__pycache__/t.py",
        "config-3.11/t.py",
        "python-config.py",
        "a.txt",
    ]
    write_tree(tmp_path, dict.fromkeys(wanted + unwanted, ""))

    found = sorted(build_corpus.find_modules(tmp_path))

    assert found == [
        ("a", tmp_path / "a.py"),
        ("notpkg.c", tmp_path / "notpkg/c.py"),
        ("pkg", tmp_path / "pkg/__init__.py"),
        ("pkg.deep.b", tmp_path / "pkg/deep/b.py"),
    ]


@pytest.mark.parametrize(
    "bad", [b"def f(:\n", b"x = '\0'\n", b"# coding: no-such\n", b"# coding: ascii\n'\xff'\n"]
)
def test_a_file_that_does_not_parse_is_counted_and_the_others_are_read(tmp_path, bad):
    write_tree(tmp_path, {"b.py": '"""B."""', "a.py": '"""A."""'})
    (tmp_path / "bad.py").write_bytes(bad)

    modules, unparsed = build_corpus.read_modules(tmp_path)

    assert [(module.name, module.docstring) for module in modules] == [("a", "A."), ("b", "B.")]
    assert unparsed == [tmp_path / "bad.py"]


def test_a_module_that_raises_at_import_is_read_without_being_imported(tmp_path):
    library = write_tree(tmp_path, {"shapes_that_raise.py": SHAPES})

    modules, unparsed = build_corpus.read_modules(library)

    assert [module.name for module in modules] == ["shapes_that_raise"] and unparsed == []
    assert "shapes_that_raise" not in sys.modules


def test_the_encoding_of_a_source_is_respected():
    module = build_corpus.parse_module("old", '# coding: latin-1\n"""Café."""'.encode("latin-1"))

    assert module.docstring == "Café."


def test_an_invalid_escape_in_a_source_gives_no_warning(recwarn):
    assert parse("m", r'"""A \d digit."""').docstring == r"A \d digit."
    assert [str(warning.message) for warning in recwarn] == []


def test_a_module_becomes_one_document_without_repeated_docstrings():
    expected = """module shapes

Shapes.

Flat ones only.

class Circle(Shape):
    A round 形.

        Indented, as "π" is.
    Not indented.

class Circle: def area(self, *, digits: int=2) -> float:
    The area,
    rounded.

    Raises nothing.

class Circle.Edge: def length(self):
    Its length.

async def draw(shape, *colours, **options):
    Draws.

def inner(x='a  b'):
    Inside."""

    documents = build_corpus.build_documents([parse("shapes", SHAPES)], {})

    assert documents == [{"text": expected, "source": "module: shapes"}]


def test_a_docstring_is_kept_in_the_first_module_only_and_an_empty_module_gives_no_document():
    modules = [
        parse("z", '"""Same."""\ndef g():\n    """Only here."""'),
        parse("b", '"""Same."""'),
        parse("a", '"""Same."""'),
        parse("none", "x = 1"),
    ]

    assert build_corpus.build_documents(modules, {}) == [
        {"text": "module a\n\nSame.", "source": "module: a"},
        {"text": "module z\n\ndef g():\n    Only here.", "source": "module: z"},
    ]


def test_a_topic_contained_in_another_is_left_out():
    topics = {
        "compound": "\nCompound\n********\n\nThe if statement\n================\n\n   Chooses.\n",
        "if": "The if statement\n****************\n\n   Chooses.\n",
        "else": "The if statement\n****************\n\n   Chooses.\n",
        "del": "The del statement\n*****************\n\nDeletes.\n",
    }

    assert build_corpus.build_documents([], topics) == [
        {
            "text": "Compound\n********\n\nThe if statement\n================\n\n   Chooses.",
            "source": "topic: compound",
        },
        {"text": "The del statement\n*****************\n\nDeletes.", "source": "topic: del"},
    ]


def test_pairs_have_a_signature_and_the_first_paragraph_on_one_line():
    pairs = build_corpus.build_pairs([parse("shapes", SHAPES)])

    assert [(pair["prompt"], pair["completion"], pair["source"]) for pair in pairs] == [
        (
            "class Circle: def area(self, *, digits: int=2) -> float:\n",
            "The area, rounded.",
            "shapes.Circle.area",
        ),
        ("class Circle.Edge: def length(self):\n", "Its length.", "shapes.Circle.Edge.length"),
        ("async def draw(shape, *colours, **options):\n", "Draws.", "shapes.draw"),
        ("def inner(x='a  b'):\n", "Inside.", "shapes.inner"),
        ("def area():\n", "Draws.", "shapes.area"),
    ]


def test_a_prompt_keeps_the_completion_of_the_first_module():
    modules = [parse("b", 'def main():\n    """From b."""'), parse("a", 'def main():\n    """From a."""')]

    assert build_corpus.build_pairs(modules) == [
        {"prompt": "def main():\n", "completion": "From a.", "source": "a.main"},
    ]


def test_a_blank_docstring_is_skipped():
    module = parse("m", 'def f():\n    """   """')

    assert build_corpus.build_pairs([module]) == []
    assert build_corpus.build_documents([module], {}) == []


def test_records_are_plain_utf8_and_half_surrogates_become_question_marks(tmp_path):
    path = tmp_path / "rows.jsonl"

    size = build_corpus.write_json_lines(path, [{"text": "é\n诗"}, {"text": "\ud800"}])

    assert path.read_bytes() == '{"text": "é\\n诗"}\n{"text": "?"}\n'.encode()
    assert size == 34


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")

    def rows():
        yield {"text": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus.write_json_lines(path, rows())

    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert path.read_text() == "old"


def test_an_unwritable_output_is_a_one_line_error_with_exit_code_6(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_corpus, "read_modules", lambda library: ([parse("a", '"""A."""')], []))
    (tmp_path / "file").write_text("in the way")

    code = build_corpus.main(["--output", str(tmp_path / "file")])

    assert code == 6
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/file: cannot be written: File exists; fix: set --output to a writable folder\n"
    )


def test_a_python_without_sources_is_a_one_line_error_with_exit_code_6(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_corpus.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))

    assert build_corpus.main(["--output", str(tmp_path / "out")]) == 6
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/nowhere: no source files of the standard library; "
        "fix: use a Python that includes them\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_real_library_gives_reproducible_megabytes_without_duplicates(tmp_path):
    for folder, seed in (("one", "1"), ("two", "2")):
        command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / folder)]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed}, capture_output=True)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("one", "two")
    )
    documents = [json.loads(line) for line in one["python-docs.jsonl"].splitlines()]
    pairs = [json.loads(line) for line in one["docstrings.jsonl"].splitlines()]

    assert sorted(one) == ["docstrings.jsonl", "python-docs.jsonl"]
    assert one == two
    assert len(one["python-docs.jsonl"]) > 2_000_000
    sources = [document["source"] for document in documents]
    assert sources == sorted(set(sources))
    assert {"module: json.decoder", "module: typing", "topic: compound", "topic: lambda"} <= set(sources)
    assert "topic: if" not in sources  # a part of "compound"
    assert len({document["text"] for document in documents}) == len(documents)
    assert len(pairs) > 4_000
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    assert all(
        pair["completion"].strip() and (pair["prompt"] + pair["completion"]).count("\n") == 1
        for pair in pairs
    )

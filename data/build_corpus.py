"""Builds a training corpus from the Python installation that runs this script; standard library only.

    pydoc_data.topics ---------------------------> python-docs.jsonl  {"text", "source"}
    *.py of the standard library --ast--> Module --^
                                            \\---> docstrings.jsonl   {"prompt", "completion", "source"}

Sources are parsed and never imported. The same installation gives the same bytes on every run.
"""

import argparse
import ast
import copy
import inspect
import json
import os
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TEST_FOLDERS = {"test", "tests", "idle_test"}
UNDERLINE = re.compile(r'^([*=\-~^"])\1+\n', re.MULTILINE)  # below a heading
EXIT_ENVIRONMENT = 6  # the exit code of hf-clm for disk and permissions

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Entry(NamedTuple):
    """A documented class or function; ``owner`` is the class of a method, or empty."""

    owner: str
    name: str
    signature: str
    docstring: str
    is_function: bool


class Module(NamedTuple):
    name: str
    docstring: str
    entries: list[Entry]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build a text corpus from this Python installation's documentation."
    )
    default = Path(__file__).resolve().parent / "local"
    parser.add_argument(
        "--output", type=Path, default=default, help="folder to write to (default: %(default)s)"
    )
    output = parser.parse_args(argv).output

    library = Path(sysconfig.get_path("stdlib"))
    modules, unparsed = read_modules(library)
    if not modules:
        return _fail(
            f"{library}: no source files of the standard library; fix: use a Python that includes them"
        )
    documents = build_documents(modules, load_topics())
    pairs = build_pairs(modules)
    try:
        output.mkdir(parents=True, exist_ok=True)
        # python-docs.jsonl is written last: if it exists, both files are complete.
        sizes = [write_json_lines(output / "docstrings.jsonl", pairs)]
        sizes.append(write_json_lines(output / "python-docs.jsonl", documents))
    except OSError as error:
        return _fail(f"{output}: cannot be written: {error.strerror}; fix: set --output to a writable folder")
    print(f"{output / 'python-docs.jsonl'}: {len(documents):,} documents, {sizes[1] / 1e6:.2f} MB")
    print(f"{output / 'docstrings.jsonl'}: {len(pairs):,} pairs, {sizes[0] / 1e6:.2f} MB")
    print(f"from {len(modules):,} modules of {library}; {len(unparsed)} files could not be parsed")
    return 0


def read_modules(library: Path) -> tuple[list[Module], list[Path]]:
    """Parses every module below ``library``, sorted by name; also returns the files that failed to parse."""
    modules, unparsed = [], []
    for name, path in sorted(find_modules(library)):
        try:
            modules.append(parse_module(name, path.read_bytes()))
        except (OSError, SyntaxError, ValueError, RecursionError):
            unparsed.append(path)
    return modules, unparsed


def find_modules(library: Path) -> Iterator[tuple[str, Path]]:
    """Yields (dotted name, file). Skips folders that are not identifiers, such as ``site-packages``."""
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [
            name
            for name in subfolders
            if name.isidentifier() and name not in TEST_FOLDERS and name != "__pycache__"
        ]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and path.stem.isidentifier():
                parts = path.relative_to(library).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


def parse_module(name: str, source: bytes) -> Module:
    """Parses a module. Raises SyntaxError or ValueError if ``source`` is not valid Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
        tree = ast.parse(source)
    entries = []
    for owner, node in _definitions(tree):
        docstring = _docstring(node)
        if docstring:
            is_function = not isinstance(node, ast.ClassDef)
            entries.append(Entry(owner, node.name, _signature(node), docstring, is_function))
    return Module(name, _docstring(tree), entries)


def load_topics() -> dict[str, str]:
    """Returns the language reference by topic; empty if ``pydoc_data`` is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def build_documents(modules: list[Module], topics: dict[str, str]) -> list[dict[str, str]]:
    """Returns a document for each module and topic, sorted by source, without duplicate docstrings."""
    seen: set[str] = set()
    documents = []
    for module in sorted(modules):
        text = _module_text(module, seen)
        if text:
            documents.append({"text": text, "source": f"module: {module.name}"})
    documents += [{"text": text, "source": f"topic: {name}"} for name, text in distinct_topics(topics)]
    return documents


def distinct_topics(topics: dict[str, str]) -> list[tuple[str, str]]:
    """Returns sorted (name, text) pairs, without topics contained in others ("compound" contains "if").

    Otherwise such a topic could be in both the training and the evaluation data.
    """
    texts = {name: inspect.cleandoc(topic).strip() for name, topic in topics.items()}
    # A heading has a different underline if it is part of a longer topic.
    plain = {name: UNDERLINE.sub("", text) for name, text in texts.items()}
    distinct: list[str] = []
    for name in sorted(texts, key=lambda name: (-len(plain[name]), name)):
        if not any(plain[name] in plain[longer] for longer in distinct):
            distinct.append(name)
    return [(name, texts[name]) for name in sorted(distinct)]


def build_pairs(modules: list[Module]) -> list[dict[str, str]]:
    """Pairs each signature with its first paragraph; for equal signatures, keeps the first one."""
    pairs: dict[str, dict[str, str]] = {}
    for module in sorted(modules):
        for entry in module.entries:
            if not entry.is_function:
                continue
            prompt = f"class {entry.owner}: {entry.signature}" if entry.owner else entry.signature
            source = ".".join(part for part in (module.name, entry.owner, entry.name) if part)
            paragraph = _first_paragraph(entry.docstring)
            pair = {"prompt": f"{prompt}\n", "completion": paragraph, "source": source}
            pairs.setdefault(prompt, pair)
    return list(pairs.values())


def write_json_lines(path: Path, rows: Iterable[dict[str, str]]) -> int:
    """Writes a file atomically, by renaming; returns its size in bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Half a surrogate pair in a docstring cannot be encoded and becomes a question mark.
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Yields (owner, class or function) in source order, nested ones included."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        owner, node = stack.pop()
        inner = owner
        if isinstance(node, Definition):
            yield owner, node
            inner = ""  # a function inside a function belongs to no class
            if isinstance(node, ast.ClassDef):
                inner = f"{owner}.{node.name}" if owner else node.name
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        stack.extend((inner, child) for child in reversed(children))


def _signature(node: Definition) -> str:
    """Returns the first line of a definition: ``def name(a, b=1) -> int:``."""
    head = copy.copy(node)
    head.body, head.decorator_list = [], []
    return " ".join(ast.unparse(head).split("\n")).strip()


def _docstring(node: ast.Module | Definition) -> str:
    return (ast.get_docstring(node, clean=True) or "").strip()


def _module_text(module: Module, seen: set[str]) -> str:
    """Formats a module: its docstring, then each signature with its docstring indented below."""
    parts = [_first_time(module.docstring, seen)]
    for entry in module.entries:
        docstring = _first_time(entry.docstring, seen)
        if docstring:
            owner = f"class {entry.owner}: " if entry.owner else ""
            parts.append(f"{owner}{entry.signature}\n{textwrap.indent(docstring, '    ')}")
    parts = [part for part in parts if part]
    return "\n\n".join([f"module {module.name}", *parts]) if parts else ""


def _first_time(text: str, seen: set[str]) -> str:
    """Returns ``text`` if it is not in ``seen`` yet, otherwise an empty string; adds it to ``seen``."""
    if text in seen:
        return ""
    seen.add(text)
    return text


def _first_paragraph(docstring: str) -> str:
    """Returns the first paragraph on one line."""
    lines = []
    for line in docstring.splitlines():
        if not line.strip():
            break
        lines.append(line.strip())
    return " ".join(lines)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_ENVIRONMENT


if __name__ == "__main__":
    sys.exit(main())

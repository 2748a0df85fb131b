"""Rows as text for a terminal: in colour, or with marks that cannot occur in the content.

├ prompt
│ Say hi.↵
├ completion
│ ⟦Hi!⟪<|endoftext|>⟫⟧          ⟦ ⟧ trained   ⟪ ⟫ control token
"""

import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby

from hf_clm.pages.rows import Atom, Document, Row, Vocabulary, escape, to_atoms

RESET = "\x1b[0m"
# Trained text is underlined as well as coloured, so that trained white space is visible.
STYLES = {
    "trained": "\x1b[4;32m",
    "read": "\x1b[2m",
    "mixed": "\x1b[4;33m",
    "trained control": "\x1b[4;35m",
    "read control": "\x1b[35m",
    "padding": "\x1b[9;90m",
    "frame": "\x1b[36m",
    "flag": "\x1b[1;31m",
}
MEANINGS = {"read": "read only", "mixed": "partly trained character", "read control": "control token"}
TRAINED, MIXED, CONTROL, NEWLINE = "⟦⟧", "⦃⦄", "⟪⟫", "↵"
RESERVED = TRAINED + MIXED + CONTROL + NEWLINE  # escaped in the content
LEAST = 8  # columns beside the gutter, however narrow the terminal is
JOINED = "\u200c\u200d\ufe0e\ufe0f"  # occupy no column


def to_lines(row: Row, vocabulary: Vocabulary, *, width: int, colors: bool) -> list[str]:
    """Returns one row: its counts, each document with place, flags, roles and tokens, and the padding."""
    trained = int(row.trained.sum())
    share = trained / max(1, row.length)
    parts = f"{len(row.documents)} document{'' if len(row.documents) == 1 else 's'}"
    head = f"row {row.number}: {row.length:,} tokens, {parts}, {trained:,} targets ({share:.1%})"
    blocks = [("", [(head, "frame")])]
    for document in row.documents:
        blocks += _to_blocks(row, document, vocabulary=vocabulary)
    if padding := len(row.input_ids) - row.length:
        token = _shown(next(vocabulary.to_groups(row.input_ids[-1:].tolist()))[2])
        blocks.append(("└ ", [("padding: ", "frame"), (f"{padding:,} × {token}", "padding")]))
    lines = []
    for gutter, atoms in blocks:
        shown = atoms if colors else _marked(atoms)
        wrapped = wrap_letters(shown, room=max(LEAST, width - len(gutter)))
        lines += [_to_line([(gutter, "frame"), *line], colors=colors) for line in wrapped]
    return lines


def legend(*, colors: bool) -> str:
    """Returns what the colours or the marks mean."""
    if colors:
        styles = [style for style in STYLES if style not in ("frame", "flag")]
        return "  ".join(_to_line([(MEANINGS.get(one, one), one)], colors=True) for one in styles)
    text = f"{TRAINED[0]}trained{TRAINED[1]}  read only  {CONTROL[0]}control token{CONTROL[1]}"
    return f"{text}  {MIXED[0]}partly trained character{MIXED[1]}"


def _to_blocks(row: Row, document: Document, *, vocabulary: Vocabulary) -> Iterator[tuple[str, list[Atom]]]:
    """Yields (the gutter of each line, atoms) of a document."""
    targets = int(row.trained[document.start : document.stop].sum())
    length = document.stop - document.start
    place = f"{_shown(document.place)}  " if document.place else ""
    yield "┌ ", [(f"{place}{length:,} tokens, {targets:,} targets", "frame")]
    if document.note:
        yield "├ ", [(_shown(document.note), "flag")]
    for flag, details in document.flags.items():
        yield "├ ", [(_shown(f"! {flag}: {details}" if details else f"! {flag}"), "flag")]
    lost = {
        flag: "cut off" if flag in document.flags else "in another row"
        for flag in ("cut prompt", "cut answer")
    }
    if document.before:
        yield "├ ", [(f"… {document.before:,} tokens before this: {lost['cut prompt']}", "frame")]
    for start, stop, role in document.turns():
        if role:
            yield "├ ", [(role, "frame")]
        atoms = to_atoms(row, (start, stop), vocabulary=vocabulary)
        yield "│ ", [(_shown(text), style) for text, style in atoms]
    if document.after:
        yield "├ ", [(f"… {document.after:,} tokens after this: {lost['cut answer']}", "frame")]


def _marked(atoms: Iterable[Atom]) -> Iterator[Atom]:
    """Puts marks in place of colours: around runs of trained text, and around each control token."""
    for kind, run in groupby(atoms, key=lambda atom: atom[1].removesuffix(" control")):
        first, last = {"trained": TRAINED, "mixed": MIXED}.get(kind, ("", ""))
        texts = (CONTROL[0] + text + CONTROL[1] if style.endswith("control") else text for text, style in run)
        text = "".join(texts)
        content = text.removesuffix("\n") if last else text  # a mark closes before the line does
        yield first + content + last + text[len(content) :], kind


def _shown(text: str) -> str:
    return escape(text, also=RESERVED).replace("\n", NEWLINE + "\n")


def wrap_letters(atoms: Iterable[Atom], *, room: int) -> Iterator[list[Atom]]:
    """Yields lines of at most ``room`` columns, as letters with their style."""
    line, used = [], 0
    for letter, style in ((letter, style) for text, style in atoms for letter in text):
        columns = columns_of(letter)
        if letter == "\n" or used + columns > room:
            yield line
            line, used = [], 0
        if letter != "\n":
            line.append((letter, style))
            used += columns
    if line:
        yield line


def _to_line(atoms: Iterable[Atom], *, colors: bool) -> str:
    text = ""
    for style, run in groupby(atoms, key=lambda atom: atom[1]):
        words = "".join(word for word, _ in run)
        text += STYLES[style] + words + RESET if colors and words else words
    return text


def columns_of(letter: str) -> int:
    """Returns the columns of a letter: 2 for East Asian wide characters and emoji, 0 for combining ones."""
    if unicodedata.combining(letter) or letter in JOINED:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1

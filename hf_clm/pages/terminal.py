"""Rows as text for a terminal: with colours, or with marks that no content can spell.

├ prompt
│ Say hi.↵
├ completion
│ ⟦Hi!⟪<|endoftext|>⟫⟧          ⟦ ⟧ trained   ⟪ ⟫ control token
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise

from hf_clm.pages.rows import Atom, Document, Row, Vocabulary, escape, to_atoms

RESET = "\x1b[0m"
# Underlined is what is trained, whatever its colour: so trained white space shows.
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
TRAINED, MIXED, CONTROL, NEWLINE = "⟦⟧", "⦃⦄", "⟪⟫", "↵"
RESERVED = TRAINED + MIXED + CONTROL + NEWLINE  # escaped where content holds one


def to_lines(row: Row, vocabulary: Vocabulary, *, width: int, colors: bool) -> list[str]:
    """One row: its counts, each document with its place, flags, roles and tokens, its padding."""
    trained = int(row.trained.sum())
    share = trained / max(1, row.length)
    parts = f"{len(row.documents)} document{'' if len(row.documents) == 1 else 's'}"
    head = f"row {row.number}: {row.length:,} tokens, {parts}, {trained:,} targets ({share:.1%})"
    lines = list(_wrap([(head, "frame")], "", width=width, colors=colors))
    for document in row.documents:
        for gutter, atoms in _document_blocks(row, document, vocabulary=vocabulary):
            lines += _wrap(atoms if colors else list(_marked(atoms)), gutter, width=width, colors=colors)
    if padding := len(row.input_ids) - row.length:
        token = _shown(next(vocabulary.to_groups(row.input_ids[-1:].tolist()))[2])
        atoms = [("padding: ", "frame"), (f"{padding:,} × {token}", "padding")]
        lines += _wrap(atoms, "└ ", width=width, colors=colors)
    return lines


def legend(*, width: int, colors: bool) -> list[str]:
    """What the colours, or the marks, mean."""
    texts = {
        "trained": "trained",
        "read": "read only",
        "mixed": "a character of which only some tokens are trained",
        "trained control": "trained control token",
        "read control": "control token",
        "padding": "padding",
    }
    if colors:
        atoms = [atom for style, text in texts.items() for atom in ((text, style), ("  ", ""))]
        return list(_wrap(atoms[:-1], "", width=width, colors=True))
    text = f"{TRAINED[0]}trained{TRAINED[1]}  read only  {CONTROL[0]}control token{CONTROL[1]}"
    text += f"  {MIXED[0]}partly trained character{MIXED[1]}"
    return list(_wrap([(text, "")], "", width=width, colors=False))


def display_width(text: str) -> int:
    """Columns of a terminal: 2 for East Asian wide characters and emoji, 0 for combining ones."""
    return sum(_letter_width(letter) for letter in text)


def wrap_text(text: str, *, width: int) -> list[str]:
    """Plain text in lines of at most ``width`` columns."""
    words = [(word, "") for word in re.findall(r"\S+\s*|\s+", escape(text))]
    return list(_wrap(words, "", width=width, colors=False))


def _document_blocks(
    row: Row, document: Document, *, vocabulary: Vocabulary
) -> Iterator[tuple[str, list[Atom]]]:
    """(what each line begins with, atoms) of a document."""
    targets = int(row.trained[document.start : document.stop].sum())
    length = document.stop - document.start
    place = f"{_shown(document.place)}  " if document.place else ""
    yield "┌ ", [(f"{place}{length:,} tokens, {targets:,} targets", "frame")]
    for flag, details in document.flags.items():
        yield "├ ", [("! " + flag, "flag"), (_shown(f": {details}" if details else ""), "flag")]
    lost = "cut off" if "cut prompt" in document.flags else "in another row"
    if document.before:
        yield "├ ", [(f"… {document.before:,} tokens before this: {lost}", "frame")]
    starts = [(document.start, ""), *document.roles, (document.stop, "")]
    for (start, role), (stop, _) in pairwise(starts):
        if role:
            yield "├ ", [(role, "frame")]
        if start < stop:
            yield "│ ", list(_token_atoms(row, (start, stop), vocabulary=vocabulary))
    lost = "cut off" if "cut answer" in document.flags else "in another row"
    if document.after:
        yield "├ ", [(f"… {document.after:,} tokens after this: {lost}", "frame")]


def _token_atoms(row: Row, tokens: tuple[int, int], *, vocabulary: Vocabulary) -> Iterator[Atom]:
    for text, style in to_atoms(row, tokens, vocabulary=vocabulary):
        yield _shown(text), style


def _marked(atoms: Iterable[Atom]) -> Iterator[Atom]:
    """Marks in the text for what colours would say: around runs of trained text, and each control token."""
    for (is_trained, is_mixed), run in groupby(
        atoms, key=lambda atom: (atom[1].startswith("trained"), atom[1] == "mixed")
    ):
        marks = TRAINED if is_trained else MIXED if is_mixed else ("", "")
        texts = [CONTROL[0] + text + CONTROL[1] if style.endswith("control") else text for text, style in run]
        texts[0] = marks[0] + texts[0]
        newline = "\n" if marks[1] and texts[-1].endswith("\n") else ""  # a mark closes before the line does
        texts[-1] = texts[-1].removesuffix(newline) + marks[1] + newline
        yield from ((text, "") for text in texts)


def _shown(text: str) -> str:
    return escape(text, also=RESERVED).replace("\n", NEWLINE + "\n")


def _wrap(atoms: Iterable[Atom], gutter: str, *, width: int, colors: bool) -> Iterator[str]:
    """Lines of at most ``width`` columns, each with the gutter; breaks between atoms where it can."""
    room = max(8, width - len(gutter))
    line: list[Atom] = []
    used = 0
    for text, style in _pieces(atoms, room):
        columns = display_width(text.rstrip("\n"))
        if used + columns > room:
            yield _line(line, gutter, colors=colors)
            line, used = [], 0
        line.append((text.rstrip("\n"), style))
        used += columns
        if text.endswith("\n"):
            yield _line(line, gutter, colors=colors)
            line, used = [], 0
    if line:
        yield _line(line, gutter, colors=colors)


def _pieces(atoms: Iterable[Atom], room: int) -> Iterator[Atom]:
    """The atoms cut behind each newline and into pieces that fit on a line."""
    for text, style in atoms:
        for part in text.splitlines(keepends=True):
            piece, used = "", 0
            for letter in part:
                columns = _letter_width(letter)
                if letter != "\n" and used + columns > room:
                    yield piece, style
                    piece, used = "", 0
                piece, used = piece + letter, used + columns
            yield piece, style


def _line(atoms: list[Atom], gutter: str, *, colors: bool) -> str:
    text = ""
    for style, run in groupby([(gutter, "frame"), *atoms], key=lambda atom: atom[1]):
        words = "".join(word for word, _ in run)
        text += STYLES[style] + words + RESET if colors and style and words else words
    return text


def _letter_width(letter: str) -> int:
    if letter == "\n" or unicodedata.combining(letter) or letter in "\u200c\u200d\ufe0e\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1

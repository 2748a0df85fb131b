"""The ``template`` of a source: a text with the columns of a record in braces.

prompt      Do these mean the same?\\n{sentence1}\\n{sentence2}\\n        {{ is a brace
completion  {label}                                                   labels: {0: no, 1: yes}
"""

from string import Formatter
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Part(NamedTuple):
    """A piece of a template: the name of a column, or text of the template's own."""

    text: str
    is_column: bool


def split_template(text: str) -> list[Part]:
    """The pieces of a template, in order. Raises ValueError for one that cannot be read."""
    parts = []
    for literal, column, form, conversion in Formatter().parse(text):
        if literal:
            parts.append(Part(literal, is_column=False))
        if column is None:
            continue
        if not column.strip() or form or conversion:
            raise ValueError("expected the name of a column alone between braces")
        parts.append(Part(column.strip(), is_column=True))
    return parts


def to_cell(value: Any) -> str:
    """A cell as text, whatever type its file gives it: ``1`` and ``"1"``, ``True`` and ``"true"``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_columns(text: str | None) -> str | None:
    try:
        columns = [part for part in split_template(text or "") if part.is_column]
    except ValueError as error:
        reason = {"reason": str(error)}
        raise PydanticCustomError("template", "{reason}; a brace itself is written twice", reason) from None
    if text is not None and not columns:
        raise PydanticCustomError("template", "names no column, so every record gives the same text")
    return text


def _to_labels(labels: Any) -> Any:
    return {to_cell(value): word for value, word in labels.items()} if isinstance(labels, dict) else labels


Pattern = Annotated[str | None, AfterValidator(_with_columns)]


class Template(BaseModel):
    """``prompt`` and ``completion``, or a ``text`` that is learned whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    prompt: Pattern = None
    """What is read."""
    completion: Pattern = None
    """What is learned behind the prompt."""
    text: Pattern = None
    """A document instead of both."""
    labels: Annotated[dict[str, str], BeforeValidator(_to_labels)] = {}
    """The word that is learned for each value of a column in the completion."""

    @model_validator(mode="after")
    def _check_together(self) -> "Template":
        is_pair = self.prompt is not None and self.completion is not None
        is_alone = self.prompt is None and self.completion is None
        if not (is_pair if self.text is None else is_alone):
            raise PydanticCustomError("template", "expected prompt and completion, or text alone")
        if self.labels and self.text is not None:
            raise PydanticCustomError("template", "labels are for a completion, and this is a text")
        return self

    @property
    def shown(self) -> str:
        """What is read before an answer: the prompt, or the text."""
        shown = self.prompt if self.text is None else self.text
        assert shown is not None, "_check_together requires one of them"
        return shown

    @property
    def columns(self) -> list[str]:
        """Those of the prompt or text, in order, each once."""
        return list(dict.fromkeys(part.text for part in split_template(self.shown) if part.is_column))

    @property
    def own_texts(self) -> list[str]:
        """What the template writes itself, between the columns."""
        whole = [text for text in (self.prompt, self.completion, self.text) if text is not None]
        return [part.text for text in whole for part in split_template(text) if not part.is_column]

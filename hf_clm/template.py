"""The ``template`` of a source: text with columns of the record in braces.

prompt      Do these mean the same?\\n{sentence1}\\n{sentence2}\\n        {{ is a literal brace
completion  {label}                                                   labels: {0: no, 1: yes}
"""

from string import Formatter
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Part(NamedTuple):
    """A piece of a template: the name of a column, or literal text."""

    text: str
    is_column: bool


def split_template(text: str) -> list[Part]:
    """Returns the pieces of a template, in order. Raises ValueError for invalid syntax."""
    parts = []
    for literal, column, form, conversion in Formatter().parse(text):
        if literal:
            parts.append(Part(literal, is_column=False))
        if column is None:
            continue
        if not column.strip() or form or conversion:
            raise ValueError("expected only the name of a column between braces")
        parts.append(Part(column.strip(), is_column=True))
    return parts


def to_cell(value: Any) -> str:
    """Returns a cell as text, the same for values of different types such as ``True`` and ``"true"``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_columns(text: str | None) -> str | None:
    try:
        columns = [part for part in split_template(text or "") if part.is_column]
    except ValueError as error:
        reason = {"reason": str(error)}
        raise PydanticCustomError("template", "{reason}; write a literal brace twice", reason) from None
    if text is not None and not columns:
        raise PydanticCustomError("template", "contains no column, so every record has the same text")
    return text


def _to_labels(labels: Any) -> Any:
    return {to_cell(value): word for value, word in labels.items()} if isinstance(labels, dict) else labels


Pattern = Annotated[str | None, AfterValidator(_with_columns)]


class Template(BaseModel):
    """``prompt`` and ``completion``, or a ``text`` that is learned completely."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    prompt: Pattern = None
    """Text that is in the context only."""
    completion: Pattern = None
    """Text after the prompt that is learned."""
    text: Pattern = None
    """A document, in place of prompt and completion."""
    labels: Annotated[dict[str, str], BeforeValidator(_to_labels)] = {}
    """The word to learn for each value of a column in the completion."""

    @model_validator(mode="after")
    def _check_together(self) -> "Template":
        is_pair = self.prompt is not None and self.completion is not None
        is_alone = self.prompt is None and self.completion is None
        if not (is_pair if self.text is None else is_alone):
            raise PydanticCustomError("template", "expected either prompt and completion, or text")
        if self.labels and self.text is not None:
            raise PydanticCustomError("template", "labels require a completion, but this is a text")
        return self

    @property
    def shown(self) -> str:
        """The template of the prompt that is shown before an answer: prompt, or text."""
        pattern = self.prompt if self.text is None else self.text
        assert pattern is not None, "_check_together requires one of them"
        return pattern

    @property
    def columns(self) -> list[str]:
        """The columns of the prompt or text, in order and without repeats."""
        return list(dict.fromkeys(part.text for part in split_template(self.shown) if part.is_column))

    @property
    def own_texts(self) -> list[str]:
        """The literal texts between the columns."""
        texts = [text for text in (self.prompt, self.completion, self.text) if text is not None]
        return [part.text for text in texts for part in split_template(text) if not part.is_column]

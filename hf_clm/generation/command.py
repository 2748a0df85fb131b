"""``hf-clm generate``: prompts from the command line or a file, rendered as the run was trained."""

from argparse import Namespace
from typing import Any, cast

from transformers import set_seed

from hf_clm.data.formats import to_prompt
from hf_clm.data.segments import whole_text
from hf_clm.data.sources import ReadOptions, ReadReport, Record, read_records
from hf_clm.data.templating import to_template_prompt
from hf_clm.errors import DataError, RecipeError
from hf_clm.generation.generate import Generated, generate, to_prompt_example
from hf_clm.generation.load import load_run
from hf_clm.schema import ChatExample, Example, Format, PromptExample, SegmentsExample, TextExample
from hf_clm.template import Template

SETTINGS = ("max_new_tokens", "slide", "num_beams", "no_repeat_ngram_size", "repetition_penalty")


def generate_from_run(options: Namespace) -> list[tuple[str, Generated]]:
    """Each prompt as it is shown, with its answer. Raises RecipeError without a prompt."""
    if not options.prompt and not options.file:
        raise RecipeError(
            "needs a prompt", where="hf-clm generate", fix='--prompt "..." or --file prompts.txt'
        )
    settings = to_settings(options)
    run = load_run(options.run, attention="sdpa", device=options.device)
    format, template = ("text", None) if options.raw else (run.format, run.template)
    shape: dict[str, Any] = {"template": template}
    prompts = [to_prompt_example(text, format, input_text=options.input, **shape) for text in options.prompt]
    if options.file:
        prompts += read_prompts(options.file, format, **shape)
    set_seed(options.seed)
    settings["special_tokens_in_text"] = run.special_tokens_in_text
    answers = generate(run.model, run.tokenizer, prompts=prompts, batch_size=options.batch_size, **settings)
    return [(to_shown(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]


def to_settings(options: Namespace) -> dict[str, Any]:
    """The options as settings of ``generate``. Sampling is on where one of its options is given."""
    samples = options.temperature > 0 or options.top_k is not None or options.top_p is not None
    settings: dict[str, Any] = {name: getattr(options, name) for name in SETTINGS}
    settings["do_sample"] = samples
    if samples:
        settings["temperature"] = options.temperature or 1.0
        settings["top_k"] = options.top_k or 0  # transformers' own default is 50
        settings["top_p"] = options.top_p if options.top_p is not None else 1.0
    if options.stop:
        settings["stop_strings"] = options.stop
    return settings


def read_prompts(path: str, format: str, *, template: Template | None = None) -> list[Example]:
    """Prompts from a txt file, one a line, or from records whose target side may be missing."""
    prompts: list[Example]
    if path.endswith(".txt"):
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if line.strip()]
        prompts = [to_prompt_example(line, format, template=template) for line in lines]
    else:
        records = read_records(path, ReadOptions(), report=ReadReport())
        prompts = [to_record_prompt(record, format, template=template) for record in records]
    if not prompts:
        raise DataError("holds no prompt", where=path)
    return prompts


def to_record_prompt(record: Record, format: str, *, template: Template | None) -> Example:
    """A record whose target side may be missing, as a prompt."""
    if template:
        return to_template_prompt(record.data, template, where=record.where)
    return to_prompt(record.data, format=cast(Format, format), where=record.where)


def to_shown(prompt: Example) -> str:
    """The prompt as one text, to print beside its answer."""
    if isinstance(prompt, ChatExample):
        return prompt.messages[-1]["content"]
    if isinstance(prompt, SegmentsExample):
        return whole_text(prompt).rstrip("\n")
    assert isinstance(prompt, PromptExample | TextExample), type(prompt)
    return prompt.prompt.rstrip("\n") if isinstance(prompt, PromptExample) else prompt.text

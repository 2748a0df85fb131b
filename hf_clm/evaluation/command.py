"""``hf-clm evaluate``: a run and a data file become one table of figures."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from hf_clm.config import Data, Recipe, Source, load_recipe
from hf_clm.data.build import check_spelled, load_examples
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.errors import DataError
from hf_clm.evaluation.evaluate import measure_answers, measure_likelihood
from hf_clm.generation.load import load_run


def evaluate_run(options: Namespace) -> dict[str, float]:
    """Likelihood of the targets and, where the examples have prompts, exact match of greedy answers.

    The data are read and labelled as in the run's recipe: its eval set gives the eval loss of its training.
    Raises DataError where no example has a target.
    """
    recipe = read_recipe(options.run)
    data = to_data(options, recipe)
    read = load_examples(data.train, data)
    examples = read.examples
    run = load_run(options.run, device=options.device)
    stage, policy = options.stage or run.stage, {"special_tokens_in_text": data.special_tokens_in_text}
    settings: dict[str, Any] = {"max_length": options.max_length or run.max_length, **policy}
    if stage == "pretrain":
        dataset = PretrainDataset(examples, run.tokenizer, **settings)
    else:
        settings["overflow"] = recipe.resolved_overflow if recipe and recipe.stage == "sft" else "keep_target"
        dataset = SFTDataset(examples, run.tokenizer, train_on=data.train_on, **settings)
    check_spelled(read, dataset.rows, tokenizer=run.tokenizer)
    if len(dataset) == 0:
        raise DataError("no example has a target that fits", where=options.data, fix="raise --max_length")
    dropped = sum(fate.kind == "dropped" for fate in dataset.rows.fates)
    sizes = {"dataset": dataset, "batch_size": options.batch_size}
    likelihood = measure_likelihood(run.model, run.tokenizer, **sizes)
    result = {"examples": len(examples), "dropped": dropped, **likelihood.to_json()}
    written = [example for example in examples if not isinstance(example, dict)]
    if stage == "sft" and not options.no_generate:
        limits = {"max_new_tokens": options.max_new_tokens, "do_sample": False, **policy}
        answers = measure_answers(run.model, run.tokenizer, examples=written, **limits)
        result.update(answers.to_json() if answers else {})
    return result


def read_recipe(run: str) -> Recipe | None:
    """The recipe of a run's folder; None for another model."""
    path = Path(run).expanduser() / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def to_data(options: Namespace, recipe: Recipe | None) -> Data:
    """The data section to read ``options.data`` with: the run's, but for its sources.

    Format and columns are those that all sources of the run share, unless ``--format`` names another.
    """
    if recipe is None:
        return Data(train=[Source(path=options.data, format=options.format)])
    keys = ("format", "fields", "template")
    first, *others = ({key: getattr(source, key) for key in keys} for source in recipe.data.train)
    is_shared = all(other == first for other in others) and not options.format
    source = Source(path=options.data, **(first if is_shared else {"format": options.format}))
    return recipe.data.model_copy(update={"train": [source], "duplicates": "keep"})

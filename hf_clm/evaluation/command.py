"""``hf-clm evaluate``: a run and a data file become one table of figures."""

from argparse import Namespace

from hf_clm.config import Data, Source
from hf_clm.data.build import load_examples
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.errors import DataError
from hf_clm.evaluation.evaluate import measure_answers, measure_likelihood
from hf_clm.generation.load import load_run


def evaluate_run(options: Namespace) -> dict[str, float]:
    """Likelihood of the targets and, where the examples have prompts, exact match of greedy answers.

    Raises DataError where no example has a target.
    """
    sources = [Source(path=options.data, format=options.format)]
    examples = load_examples(sources, Data(train=sources)).examples
    run = load_run(options.run, device=options.device)
    stage, max_length = options.stage or run.stage, options.max_length or run.max_length
    if stage == "pretrain":
        dataset = PretrainDataset(examples, run.tokenizer, max_length=max_length)
    else:
        dataset = SFTDataset(examples, run.tokenizer, max_length=max_length)
    if len(dataset) == 0:
        raise DataError("no example has a target that fits", where=options.data, fix="raise --max_length")
    dropped = sum(fate.kind == "dropped" for fate in dataset.rows.fates)
    likelihood = measure_likelihood(run.model, run.tokenizer, dataset=dataset, batch_size=options.batch_size)
    result = {"examples": len(examples), "dropped": dropped, **likelihood.to_json()}
    written = [example for example in examples if not isinstance(example, dict)]
    if stage == "sft" and not options.no_generate:
        settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
        answers = measure_answers(run.model, run.tokenizer, examples=written, **settings)
        result.update(answers.to_json() if answers else {})
    return result

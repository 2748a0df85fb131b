"""One run, from a recipe to a folder that ``from_pretrained`` opens. Read this first."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from hf_clm.attention import NAME as PACKED
from hf_clm.config import Recipe, recipe_to_yaml, training_values
from hf_clm.data.build import Examples, Split, build_split, load_splits, texts_of
from hf_clm.data.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.errors import DataError, ModelError, RecipeError
from hf_clm.evaluation.metrics import unigram_entropy
from hf_clm.generation.generate import generate, to_prompt_example
from hf_clm.model import build_config, init_model, load_config, load_model, max_positions
from hf_clm.tokenizer import add_pad_token, load_tokenizer, use_chat_template
from hf_clm.train_tokenizer import train_bpe
from hf_clm.training.callbacks import MetricsCallback, ProgressCallback, SamplesCallback, write_line
from hf_clm.training.output import prepare_output_dir, resume_from, write_json
from hf_clm.training.plots import write_loss_plot
from hf_clm.training.summary import RunFacts, end_lines, start_lines, versions
from hf_clm.training.trainer import CLMTrainer

EVALUATED_ROWS = (
    64  # of the training data, where there is no eval set: enough to show a loss before and after
)


def train(recipe: Recipe, *, is_terminal: bool = False) -> dict[str, Any]:
    """Trains, saves, returns what run.json holds. Raises UserError before the first step."""
    arguments = training_arguments(recipe)
    output_dir = prepare_output_dir(arguments, overwrite=recipe.overwrite)
    train_examples, eval_examples = load_splits(recipe, arguments.seed)
    tokenizer = build_tokenizer(recipe, train_examples, arguments=arguments)
    config = build_model_config(recipe, tokenizer)
    options = {"tokenizer": tokenizer, "stage": recipe.stage}
    train_split = build_split(train_examples, recipe, **options)
    eval_split = build_split(eval_examples, recipe, **options) if eval_examples else None
    check_steps(arguments, train_split)
    model = build_model(recipe, tokenizer, config=config, seed=arguments.seed)

    trainer = build_trainer(
        model, arguments, recipe=recipe, tokenizer=tokenizer, splits=(train_split, eval_split)
    )
    facts = RunFacts(
        recipe, arguments, model, train_split, eval_split, unigram_entropy(train_split.rows.rows.labels)
    )
    is_main = trainer.is_world_process_zero()
    if is_main:
        trainer.add_callback(ProgressCallback(is_terminal=is_terminal))
        trainer.add_callback(MetricsCallback(output_dir / "metrics.jsonl"))
        (output_dir / "recipe.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
        write_json(output_dir / "run.json", {"status": "running", **facts.to_json()})
        write_line("\n".join(start_lines(facts)))
    if recipe.samples:
        trainer.add_callback(build_samples(recipe, trainer, tokenizer=tokenizer, format=facts.format))
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume_from(arguments))
    return finish(trainer, facts, output_dir=output_dir, seconds=time.monotonic() - started)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """TrainingArguments of the recipe; bf16 autocast where the GPU has it and the recipe is silent."""
    values = training_values(recipe)
    on_gpu = torch.cuda.is_available() and not values.get("use_cpu")
    if on_gpu and torch.cuda.is_bf16_supported() and not values.get("fp16"):
        values.setdefault("bf16", True)
    values.setdefault("dataloader_pin_memory", on_gpu)  # else a warning on every run on a CPU
    try:
        arguments = TrainingArguments(**values, eval_on_start=values.pop("eval_on_start", True))
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(str(error).splitlines()[0], where="train") from error
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # DataParallel cannot split a packed row; many GPUs need a launcher
    return arguments


def build_tokenizer(
    recipe: Recipe, examples: Examples, *, arguments: TrainingArguments
) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, or trains it on the training texts: once, on rank 0; the others load that."""
    section = recipe.tokenizer
    if section.train is None:
        name = section.name_or_path or recipe.model.name_or_path
        assert name is not None, "config.py requires one of them"
        return load_tokenizer(
            name,
            pad_token=section.pad_token,
            eos_token=section.eos_token,
            chat_template=section.chat_template,
            revision=recipe.model.revision if section.name_or_path is None else None,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    folder = str(arguments.output_dir)
    with arguments.main_process_first(desc="training the tokenizer"):
        if arguments.process_index == 0:
            options = {"vocab_size": section.train.vocab_size, "min_frequency": section.train.min_frequency}
            trained = train_bpe(texts_of(examples.examples), pad_token=section.pad_token, **options)
            if section.chat_template:
                use_chat_template(trained, section.chat_template)
            trained.save_pretrained(folder)
        tokenizer = load_tokenizer(folder, pad_token=section.pad_token)
    add_pad_token(tokenizer, section.pad_token)
    return tokenizer


def build_model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The model's configuration. Raises ModelError where a row is longer than its positions."""
    model = recipe.model
    if model.init == "scratch" and model.config:
        config = build_config(model.config, tokenizer)
    else:
        assert model.name_or_path is not None, "config.py requires one of them"
        options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        config = load_config(model.name_or_path, **options)
    limit = max_positions(config)
    if limit is not None and recipe.data.max_length > limit:
        what = f"{recipe.data.max_length} is over the model's {limit} positions"
        raise ModelError(what, where="data.max_length", fix=f"set it to {limit} or less")
    return config


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, config: PretrainedConfig, seed: int
) -> PreTrainedModel:
    """The model: random weights drawn from ``seed``, or loaded ones."""
    section = recipe.model
    if section.init == "scratch":
        set_seed(seed)
        return init_model(config, tokenizer, dtype=section.dtype, attention=section.attention)
    assert section.name_or_path is not None, "config.py requires it"
    return load_model(
        section.name_or_path,
        tokenizer,
        dtype=section.dtype,
        attention=section.attention,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        allow_bin=section.allow_bin,
    )


def build_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    splits: tuple[Split, Split | None],
) -> CLMTrainer:
    """The Trainer over the packed rows; without an eval set it evaluates on some of the training rows."""
    train_split, eval_split = splits
    some = torch.utils.data.Subset(train_split.dataset, range(min(EVALUATED_ROWS, len(train_split.dataset))))
    is_padded = recipe.resolved_packing == "none" and recipe.model.attention != PACKED
    trainer = CLMTrainer(
        model=model,
        args=arguments,
        data_collator=(
            DataCollatorForCausalLM(_pad_id(tokenizer)) if is_padded else DataCollatorForPackedCausalLM()
        ),
        train_dataset=train_split.dataset,
        eval_dataset=eval_split.dataset if eval_split else some,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.early_stopping:
        patience, threshold = recipe.early_stopping.patience, recipe.early_stopping.threshold
        trainer.add_callback(EarlyStoppingCallback(patience, threshold))
    return trainer


def build_samples(
    recipe: Recipe, trainer: CLMTrainer, *, tokenizer: PreTrainedTokenizerFast, format: str
) -> SamplesCallback:
    """Generates the recipe's sample prompts, rendered as the training data are."""
    section = recipe.samples
    assert section is not None
    prompts = [to_prompt_example(prompt, format) for prompt in section.prompts]
    options: dict[str, Any] = {"max_new_tokens": section.max_new_tokens, "do_sample": section.temperature > 0}
    if section.temperature > 0:
        options["temperature"] = section.temperature

    def answers() -> list[str]:
        with trainer.untimed():
            model = trainer.accelerator.unwrap_model(trainer.model)
            return [answer.text for answer in generate(model, tokenizer, prompts=prompts, **options)]

    path = Path(str(trainer.args.output_dir)) / "samples.jsonl"
    return SamplesCallback(section.prompts, answers, path=path, every_steps=section.every_steps)


def check_steps(arguments: TrainingArguments, split: Split) -> None:
    """Raises DataError where the Trainer would make no step and report success."""
    rows, batch = len(split.dataset), arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and rows < batch:
        what = f"{rows} rows do not fill a batch of {batch} (per device x processes), and drop_last is on"
        raise DataError(what, where="data.train", fix="lower train.per_device_train_batch_size")


def finish(trainer: CLMTrainer, facts: RunFacts, *, output_dir: Path, seconds: float) -> dict[str, Any]:
    """Evaluates, saves the model, run.json and loss.png, and prints what was reached."""
    history, arguments = trainer.state.log_history, trainer.args
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    is_known = last.get("step") == trainer.state.global_step and not arguments.load_best_model_at_end
    final = last if is_known else trainer.evaluate()
    trainer.save_model(str(output_dir))
    result = {
        "status": "done",
        **facts.to_json(),
        **facts.outcome(history, final, seconds=seconds),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        entries = [
            json.loads(line) for line in (output_dir / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
        write_loss_plot(entries, output_dir / "loss.png")
        write_json(output_dir / "run.json", result)
        write_line("\n".join(end_lines(facts, result)))
    return result


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer gives it one"
    return tokenizer.pad_token_id

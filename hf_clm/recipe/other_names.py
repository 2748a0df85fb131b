"""The options of other training tools, and their replacements.

Users often type the names of other tools. Unknown names are looked up in these tables before the most similar
key is suggested, as ``max_steps`` resembles ``max_seq_length`` only in spelling.

A value is a key of the recipe, or advice that begins with a verb.
"""

import re

LAUNCHED = "remove it, and start the run with accelerate launch --num_processes N -m hf_clm train RECIPE"
TARGETS = "remove it: only the targets are learned in stage sft; data.train_on selects the turns"
ROWS = (
    "use per_device_train_batch_size and gradient_accumulation_steps, whose product with the number of "
    "processes is the number of rows in a step"
)
NO_PADDING = "remove it: packed rows contain no padding"
WORKERS = "remove it; hf-clm prepare RECIPE --ray local prepares the data on all cores"
PACKED = "remove it: rows are packed by default; data.packing is none, best_fit or stream"
GROUP = "use optimizer.groups: [{match: REGEX, learning_rate: RATE}]"
LORA_PLUS = "use optimizer.groups: [{match: lora_B, learning_rate: RATE}], the ratio times learning_rate"
FROZEN = "use optimizer.freeze: [REGEX], a list of regular expressions for names of weights"
LORA = "use --lora true, or add a section lora to the recipe"

# Names of transformers 4 that version 5 no longer has.
TRANSFORMERS_4 = {
    "evaluation_strategy": "train.eval_strategy",
    "warmup_ratio": "use warmup_steps: a number below 1 is a share of the run",
    "group_by_length": "use train_sampling_strategy: group_by_length",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "remove it: safetensors is the only format",
    "overwrite_output_dir": "use overwrite: true at the recipe's top level",
    "include_tokens_per_second": "remove it: tokens per second are always measured",
    "no_cuda": "set use_cpu: true",
    "tokenizer": "set it in the section tokenizer",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "train.per_device_eval_batch_size",
    "adafactor": "use optim: adafactor",
    "torch_dtype": "model.dtype",
    "half_precision_backend": "remove it",
    "include_inputs_for_metrics": "remove it: evaluation.metrics names functions of answers and targets",
    "push_to_hub_token": "set the environment variable HF_TOKEN",
}
TRL = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "trust_remote_code": "model.trust_remote_code",
    "model_init_kwargs": "set the keys of the section model: dtype, attention, revision, ...",
    "dataset_name": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "dataset_config": "use data.train: [{path: ..., name: CONFIGURATION}]",
    "dataset_train_split": "use data.train: [{path: ..., split: SPLIT}]",
    "dataset_test_split": "use data.eval: [{path: ..., split: SPLIT}]",
    "dataset_text_field": "use data.train: [{path: ..., format: text, fields: {text: COLUMN}}]",
    "dataset_streaming": "data.streaming",
    "dataset_num_proc": WORKERS,
    "dataset_kwargs": "remove it",
    "formatting_func": "use format: module:function, a function from a record to a Chat or a Document",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "truncation_mode": "data.overflow",
    "packing": PACKED,
    "packing_strategy": "data.packing",
    "eval_packing": "remove it: evaluation rows are packed like the training rows",
    "padding_free": NO_PADDING,
    "pad_to_multiple_of": NO_PADDING,
    "assistant_only_loss": TARGETS,
    "completion_only_loss": TARGETS,
    "pad_token": "tokenizer.pad_token",
    "eos_token": "tokenizer.eos_token",
    "chat_template_path": "tokenizer.chat_template",
    "use_peft": LORA,
    "peft_config": LORA,
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_bias": "remove it: biases stay frozen",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "load_in_4bit": "use lora.quantize: 4bit",
    "load_in_8bit": "use lora.quantize: 4bit, the only quantization here",
    "bnb_4bit_quant_type": "remove it: lora.quantize: 4bit is NF4 with double quantization",
    "use_bnb_nested_quant": "remove it: lora.quantize: 4bit is NF4 with double quantization",
    "loss_type": "remove it: the loss is the weighted cross-entropy of the targets",
}
AXOLOTL = {
    "base_model": "model.name_or_path",
    "base_model_config": "remove it: the configuration comes with the model",
    "model_type": "remove it: the class of the model comes with its configuration",
    "tokenizer_type": "remove it: the class of the tokenizer comes with its files",
    "tokenizer_config": "tokenizer.name_or_path",
    "special_tokens": "use tokenizer.pad_token, tokenizer.eos_token and tokenizer.control_tokens",
    "added_tokens": "tokenizer.control_tokens",
    "datasets": "data.train",
    "test_datasets": "data.eval",
    "pretraining_dataset": "use stage: pretrain and data.train",
    "val_set_size": "data.eval_fraction",
    "dataset_prepared_path": "data.cache_dir",
    "dataset_processes": WORKERS,
    "sequence_len": "data.max_length",
    "excess_length_strategy": "data.overflow",
    "sample_packing": PACKED,
    "pad_to_sequence_len": NO_PADDING,
    "train_on_inputs": "remove it if it is false; use data.train_on: everything if it is true",
    "roles_to_train": TARGETS,
    "adapter": LORA,
    "lora_target_linear": "use lora.target_modules: all-linear",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "micro_batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "optimizer": "use the section optimizer (muon, groups of weights), or train.optim",
    "loraplus_lr_ratio": LORA_PLUS,
    "loraplus_lr_embedding": "use optimizer.groups: [{match: lora_embedding, learning_rate: RATE}]",
    "lr_groups": GROUP,
    "embedding_lr": GROUP,
    "embedding_lr_scale": GROUP,
    "unfrozen_parameters": FROZEN,
    "lr_scheduler": "train.lr_scheduler_type",
    "evals_per_epoch": "use eval_strategy: steps and eval_steps: a number below 1 is a share of the run",
    "saves_per_epoch": "use save_strategy: steps and save_steps: a number below 1 is a share of the run",
    "early_stopping_patience": "early_stopping.patience",
    "flash_attention": "model.attention",
    "xformers_attention": "model.attention",
    "wandb_project": "set the environment variable WANDB_PROJECT, and set report_to: wandb",
    "wandb_name": "train.run_name",
    "chat_template_jinja": "tokenizer.chat_template",
    "load_in_bf16": "use model.dtype: bfloat16",
}
LLAMA_FACTORY = {
    "finetuning_type": LORA,
    "dataset": "data.train",
    "dataset_dir": "set paths in data.train",
    "val_size": "data.eval_fraction",
    "template": "tokenizer.chat_template",
    "cutoff_len": "data.max_length",
    "neat_packing": PACKED,
    "max_samples": "use data.train: [{path: ..., limit: N}]",
    "preprocessing_num_workers": WORKERS,
    "overwrite_cache": "remove it: prepared data are identified by their content",
    "tokenized_path": "data.cache_dir",
    "mask_history": "use data.train_on: {turns: last}",
    "train_on_prompt": "remove it if it is false; use data.train_on: everything if it is true",
    "mix_strategy": "data.mixing",
    "interleave_probs": "set a weight for each source of data.train",
    "lora_rank": "lora.r",
    "loraplus_lr_ratio": LORA_PLUS,
    "use_muon": "use optimizer.name: muon",
    "freeze_trainable_layers": FROZEN,
    "freeze_trainable_modules": FROZEN,
    "lora_target": "lora.target_modules",
    "additional_target": "lora.modules_to_save",
    "quantization_bit": "use lora.quantize: 4bit",
    "quantization_method": "remove it: lora.quantize: 4bit is bitsandbytes' NF4",
    "flash_attn": "model.attention",
    "resize_vocab": "remove it: the embeddings grow when a token needs it",
    "plot_loss": "remove it: a plot and a report are always written",
    "enable_thinking": "use tokenizer.chat_template_kwargs: {enable_thinking: false}",
}
LITGPT = {
    "checkpoint_dir": "model.name_or_path",
    "out_dir": "train.output_dir",
    "precision": "use bf16: true or fp16: true",
    "devices": LAUNCHED,
    "num_nodes": LAUNCHED,
    "global_batch_size": ROWS,
    "lr_warmup_steps": "train.warmup_steps",
    "lr_warmup_fraction": "use warmup_steps: a number below 1 is a share of the run",
    "epochs": "train.num_train_epochs",
    "max_tokens": "use max_steps",
    "save_interval": "train.save_steps",
    "log_interval": "train.logging_steps",
    "interval": "train.eval_steps",
    "max_norm": "train.max_grad_norm",
    "quantize": "lora.quantize",
}
PYTORCH_SCRIPTS = {
    "lr": "train.learning_rate",
    "matrix_lr": GROUP,
    "embedding_learning_rate": GROUP,
    "unembedding_lr": GROUP,
    "layerwise_lr_decay": "optimizer.layer_decay",
    "batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "device_batch_size": "train.per_device_train_batch_size",
    "total_batch_size": ROWS,
    "grad_accum_steps": "train.gradient_accumulation_steps",
    "num_iterations": "train.max_steps",
    "max_iters": "train.max_steps",
    "grad_clip": "train.max_grad_norm",
    "block_size": "data.max_length",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "train_data": "data.train",
    "eval_data": "data.eval",
    "output": "train.output_dir",
    "device": "set use_cpu: true, or set CUDA_VISIBLE_DEVICES",
    "gpus": LAUNCHED,
    "num_gpus": LAUNCHED,
    "compile": "train.torch_compile",
    "resume": "train.resume_from_checkpoint",
}
TOOLS = {
    "transformers 4": TRANSFORMERS_4,
    "TRL": TRL,
    "axolotl": AXOLOTL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "litgpt": LITGPT,
    "other trainers": PYTORCH_SCRIPTS,
}
SETTING = re.compile(r"use (?:the key )?([a-z_.]+): ([\w-]+)")
IS_KEY = re.compile(r"[a-z_]+\.[a-z_]+")
SECTIONS = (
    "train",
    "model",
    "data",
    "lora",
    "tokenizer",
    "eval",
    "optimizer",
)  # some are sections of litgpt's options too


def advise(key: str, *, is_option: bool = False) -> tuple[str, str] | None:
    """Returns (the tool that uses this name, what to use instead), or None for an unknown name.

    Args:
        key: a dotted key that the recipe does not have: ``max_seq_length``, ``train.micro_batch_size``.
        is_option: whether it was an option of the command line.
    """
    section, _, name = key.rpartition(".")
    if section and section not in SECTIONS:
        return None
    name = name.replace("-", "_").lower()
    for tool, names in TOOLS.items():
        if advice := names.get(name):
            if advice == key:  # the name is correct here, so the fault is another one
                return None
            if not IS_KEY.fullmatch(advice):
                setting = SETTING.fullmatch(advice) if is_option else None
                return tool, f"use --{setting[1]} {setting[2]}" if setting else advice
            short = advice.removeprefix("train.")
            return tool, f"use {f'--{short}' if is_option else advice}"
    return None

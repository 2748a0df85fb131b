"""The models, rows and batches of the GPU benchmark (gpu.py), defined by literals.

FLOP are those that the task needs, the same for every arm: 6 (4 where it is frozen) for a weight of a matrix
product and real token, for one of the head and target; 12 x layers x width for a pair of tokens, one attends
to the other. A causal document of L tokens has L (L + 1) / 2. A lookup of an embedding, and padding, is none.

  GPT-2 124M at 1024   12 layers x 12 x 768^2 = 84.9M weights, head 50,304 x 768 = 38.6M, mean pairs 512.5:
                       6 x 123.5M + 12 x 12 x 768 x 512.5 = 0.798 GFLOP a token
  Qwen2.5-0.5B         24 x (2 x 896^2 + 2 x 896 x 128 + 3 x 896 x 4,864) = 357.8M weights, head 136.1M:
                       2.15 GFLOP a token, 0.82 a target, 258,048 FLOP a pair
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cases import FIRST, IGNORE, PAD, build_tokenizer

MEDIAN_TOKENS, SPREAD, TARGET_SHARE = 300, 0.8, 0.65  # of the documents of SFT, with log-normal lengths


@dataclass(frozen=True)
class Case:
    """A model and its training data.

    rows: of an optimizer step; stock_rows: of a micro-batch of the stock Trainer, whose logits are large.
    """

    model_type: str
    layers: int
    width: int
    heads: int
    key_heads: int
    mlp: int
    vocab: int
    max_length: int
    rows: int
    stock_rows: int
    is_sft: bool
    is_lora: bool = False

    @property
    def layer_weights(self) -> int:
        """The parameters in matrix products of all layers."""
        key_width = self.key_heads * self.width // self.heads
        gates = 3 if self.model_type == "qwen2" else 2
        attention = 2 * self.width**2 + 2 * self.width * key_width
        return self.layers * (attention + gates * self.width * self.mlp)

    def flops(self, rows: list[Any]) -> float:
        """Returns the FLOP for training on packed rows. See the head of the file."""
        each = 4 if self.is_lora else 6
        labels = sum(sum(label != IGNORE for label in row["labels"]) for row in rows)
        tokens = sum(len(row["input_ids"]) for row in rows)
        pairs = sum(position + 1 for row in rows for position in row["position_ids"])
        head = self.vocab * self.width * labels
        return each * (self.layer_weights * tokens + head) + 12 * self.layers * self.width * pairs


GPT2 = Case("gpt2", 12, 768, 12, 12, 3072, 50_304, 1024, 32, 32, is_sft=False)
QWEN = Case("qwen2", 24, 896, 14, 2, 4864, 151_936, 2048, 8, 4, is_sft=True)
CASES = {"gpt2-124m": GPT2, "qwen2.5-0.5b-sft": QWEN, "qwen2.5-0.5b-lora": replace(QWEN, is_lora=True)}
TINY: dict[str, Any] = {"layers": 2, "width": 64, "heads": 4, "mlp": 128, "vocab": 512, "max_length": 64}


@dataclass(frozen=True)
class Plan:
    """The steps of a run: ``warm_up``, 3 windows, 2 steps that count synchronisations, and a profiled one."""

    warm_up: int
    window: int
    is_miniature: bool

    @property
    def edges(self) -> list[int]:
        return [self.warm_up + number * self.window for number in range(4)]

    @property
    def steps(self) -> int:
        return self.edges[-1] + 3

    def case(self, name: str) -> Case:
        case = CASES[name]
        key_heads = 2 if case.model_type == "qwen2" else 4
        return replace(case, **TINY, key_heads=key_heads, rows=4, stock_rows=2) if self.is_miniature else case


def build_rows(case: Case, plan: Plan) -> list[dict[str, Any]]:
    """Returns packed rows for all steps: full rows of one document, or best-fit rows of many."""
    from hf_clm.data.batch.packing import best_fit_rows

    draw, wanted = np.random.default_rng(0), plan.steps * case.rows
    if not case.is_sft:
        ids = draw.integers(FIRST, case.vocab, (wanted, case.max_length))
        return [_to_row([(row.tolist(), 1)]) for row in ids]
    median = min(MEDIAN_TOKENS, case.max_length // 4)
    count = 2 * wanted * case.max_length // median
    lengths = np.clip(draw.lognormal(np.log(median), SPREAD, count), 8, case.max_length).astype(int)
    packed = best_fit_rows(lengths, case.max_length)
    chosen = draw.permutation(len(packed))[:wanted]
    assert len(chosen) == wanted, "too few documents were drawn"
    documents = [[stop for _, _, stop in packed[int(number)]] for number in chosen]
    texts = ([draw.integers(FIRST, case.vocab, length).tolist() for length in row] for row in documents)
    share = 1 - TARGET_SHARE
    return [_to_row([(ids, max(1, round(len(ids) * share))) for ids in row]) for row in texts]


def _to_row(documents: list[tuple[list[int], int]]) -> dict[str, Any]:
    return {
        "input_ids": [token for ids, _ in documents for token in ids],
        "labels": [token for ids, prompt in documents for token in [IGNORE] * prompt + ids[prompt:]],
        "position_ids": [place for ids, _ in documents for place in range(len(ids))],
    }


def build_model(case: Case, attention: str) -> Any:
    """Returns a model with random weights: trained weights in float32, a frozen base in bfloat16."""
    import torch

    from hf_clm.model.load import build_config, init_model

    common = {"vocab_size": case.vocab, "initializer_range": 0.02}
    settings: dict[str, Any] = {
        "gpt2": {
            **{"n_layer": case.layers, "n_head": case.heads, "n_embd": case.width, "n_inner": case.mlp},
            **{"n_positions": case.max_length, "activation_function": "gelu_pytorch_tanh"},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        },
        "qwen2": {
            **{
                "num_hidden_layers": case.layers,
                "num_attention_heads": case.heads,
                "hidden_size": case.width,
            },
            **{"num_key_value_heads": case.key_heads, "intermediate_size": case.mlp},
            **{"max_position_embeddings": case.max_length, "tie_word_embeddings": True},
        },
    }[case.model_type]
    torch.manual_seed(0)
    config = build_config({"model_type": case.model_type, **common, **settings}, build_tokenizer())
    dtype = "bfloat16" if case.is_lora else "float32"
    model = init_model(config, build_tokenizer(), dtype=dtype, attention=attention)
    if not case.is_lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )


class PaddedRows:
    """Collates for the stock arms to (B, T). ``position_ids`` restart, so that sdpa isolates documents."""

    def __init__(self, case: Case):
        self.case = case

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        shape = (len(rows), self.case.max_length)
        batch = {"input_ids": np.full(shape, PAD), "labels": np.full(shape, IGNORE)}
        if self.case.is_sft:  # the rest of a row is a document of padding
            batch["position_ids"] = np.tile(np.arange(shape[1]), (shape[0], 1))
        for number, row in enumerate(rows):
            used = len(row["input_ids"])
            for key, values in batch.items():
                values[number, :used] = row[key]
            if self.case.is_sft:
                batch["position_ids"][number, used:] = np.arange(shape[1] - used)
        return {key: torch.from_numpy(values) for key, values in batch.items()}


def build_collator(case: Case, rows: list[dict[str, Any]]) -> Any:
    """Returns hf_clm's collator, with a static shape."""
    from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM, StaticShape

    batches = [rows[first : first + case.rows] for first in range(0, len(rows), case.rows)]
    documents = max(sum(row["position_ids"].count(0) for row in batch) for batch in batches)
    targets = max(sum(label != IGNORE for row in batch for label in row["labels"]) for batch in batches)
    shape = StaticShape(case.rows * case.max_length, documents, case.max_length, targets)
    return DataCollatorForPackedCausalLM(with_targets=True, static=shape, pad_token_id=PAD)


def leak(model: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns how much the logits of a packed row differ, relative to the largest, in bfloat16 autocast.

    alone: from its documents alone under sdpa; beside: from itself, beside another first document.
    """
    import torch

    from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
    from hf_clm.model.attention import use_for_generation, use_for_training

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.eval()
    first, *others = [row["input_ids"][:length] for row, length in zip(rows, (40, 17, 1, 33), strict=False)]

    def logits(*documents: list[int]) -> torch.Tensor:
        batch = DataCollatorForPackedCausalLM()([_to_row([(ids, 1) for ids in documents])])
        batch.pop("labels")
        moved = {k: v.to(base.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        with torch.no_grad(), torch.autocast(base.device.type, dtype=torch.bfloat16):
            return base(**moved, use_cache=False).logits[0].float()

    together = logits(first, *others)
    beside = logits(first[::-1], *others)[len(first) :] - together[len(first) :]
    use_for_generation(base)
    alone = torch.cat([logits(ids) for ids in (first, *others)])
    use_for_training(base, "packed")
    scale = float(alone.abs().max())
    return {
        "alone": float((together - alone).abs().max()) / scale,
        "beside": float(beside.abs().max()) / scale,
    }

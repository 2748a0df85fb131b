"""Opens the saved model in a fresh process with transformers alone, and compares it with the model here.

this process    save ----> compare logits, ids, template, prompts, answers <----+
                  |                                                             |
a fresh one       +--> from_pretrained, forward, render, pipeline(messages) ----+
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.errors import ModelError
from hf_clm.generation.generate import generation_mode
from hf_clm.generation.sampling import stop_ids
from hf_clm.model.load import is_adapted

WHERE = "round trip"
FOLDER = ".round-trip"
SAMPLE = "Hello, world. 你好，世界。 \n\t1234"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
PROMPT_TOKENS = 16
NEW_TOKENS = 16  # of an answer
# Relative to the largest logit: another attention kernel or device sums in another order.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# What runs in the fresh process, without hf_clm.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, sample, messages, ids, dtype, asked, new_tokens = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
if Path(folder, "adapter_config.json").exists():
    from peft import AutoPeftModelForCausalLM as AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()
settings = GenerationConfig.from_pretrained(folder)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
template = tokenizer.chat_template and tokenizer.apply_chat_template(messages, tokenize=False)
prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]
answers = []
if asked:
    from transformers import pipeline
    model.generation_config = settings  # adapters have that of the model that they belong to
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answers = [ask(m, max_new_tokens=new_tokens)[0]["generated_text"][-1]["content"] for m in asked]
print(json.dumps({
    "prompts": prompts, "answers": answers,
    "logits": logits.tolist(), "sample": tokenizer(sample)["input_ids"], "template": template,
    "pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "config_pad": model.config.pad_token_id,
    "stop": settings.eos_token_id, "use_cache": model.config.use_cache,
}))
"""


class Question(NamedTuple):
    """Messages to ask with, and the ids that training has before the answer."""

    messages: list[dict[str, str]]
    ids: list[int]


@dataclass
class RoundTrip:
    """A fresh process that is opening the saved model."""

    process: subprocess.Popen
    prompt: list[int]
    asked: Sequence[Question]
    started: float

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Waits for the process and compares. Raises ModelError for the first difference."""
        text, errors = self.process.communicate()
        if self.process.returncode != 0:
            last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
            raise ModelError("the saved model does not open with from_pretrained", where=WHERE, got=last)
        seen = json.loads(text)
        with torch.no_grad(), generation_mode(model):
            self._compare_answers(model, tokenizer, prompts=seen["prompts"], answers=seen["answers"])
            logits, own = torch.tensor(seen["logits"]), _last_logits(model, self.prompt).cpu()
        if is_adapted(
            model
        ):  # the row that was added for the pad token, which is not saved, holds any numbers
            pad: Any = tokenizer.pad_token_id
            logits[pad] = own[pad] = 0.0
        difference = float((logits - own).abs().max() / own.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCES[model.dtype]:
            got = f"a relative difference of {difference:g}"
            raise ModelError("the saved model gives other logits", where=WHERE, got=got)
        expected = _expect(model, tokenizer)
        for key, value in expected.items():
            if seen[key] != value:
                got = f"{seen[key]!r} instead of {value!r}"
                raise ModelError(f"the saved model has another {key}", where=WHERE, got=got)
        return {
            "logit_difference": difference,
            "compared": sorted(expected),
            "seconds": time.monotonic() - self.started,
            "asked": len(self.asked),
        }

    def _compare_answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        prompts: list[list[int]],
        answers: list[str],
    ) -> None:
        """Raises ModelError where the saved model is asked or answers differently from the model here."""
        for question, ids, answer in zip(self.asked, prompts, answers, strict=True):
            if ids != question.ids:
                what = "the saved chat template does not write the prompt of training"
                got = f"{tokenizer.decode(ids)[-60:]!r} instead of {tokenizer.decode(question.ids)[-60:]!r}"
                raise ModelError(what, where=WHERE, got=got)
            own, is_sure = _answer(model, tokenizer, ids, other=answer)
            if own.strip() != answer.strip() and is_sure:
                got = f"{answer[:60]!r} instead of {own[:60]!r}"
                raise ModelError("the saved model gives another answer", where=WHERE, got=got)


def start_round_trip(
    folder: Path, prompt: list[int], *, dtype: str = "auto", asked: Sequence[Question] = ()
) -> RoundTrip:
    """Opens the model in ``folder`` in a fresh process, which works while this one continues.

    Args:
        prompt: token ids; the first few are used.
        dtype: of the weights; adapters do not name that of the model they belong to.
        asked: what to ask it with ``pipeline("text-generation")``.
    """
    started, prompt = time.monotonic(), prompt[:PROMPT_TOKENS]
    words, pipe = [sys.executable, "-c", SCRIPT], subprocess.PIPE
    process = subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    messages = [question.messages for question in asked]
    process.stdin.write(json.dumps([str(folder), SAMPLE, MESSAGES, prompt, dtype, messages, NEW_TOKENS]))
    process.stdin.close()
    process.stdin = None  # communicate() would flush it
    return RoundTrip(process, prompt, asked, started)


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int], *, other: str
) -> tuple[str, bool]:
    """A greedy answer, and whether it surely differs from ``other``.

    It does not where two tokens are equally likely within the rounding of this device.
    """
    found: list[int] = []
    is_sure = True
    for _ in range(NEW_TOKENS):
        logits = _last_logits(model, ids + found)
        best = logits.topk(2)
        gap = float(best.values[0] - best.values[1]) / float(logits.abs().max().clamp(min=1e-6))
        found.append(int(best.indices[0]))
        if found[-1] in stop_ids(model):
            break
        text = str(tokenizer.decode(found, skip_special_tokens=True)).strip()
        is_sure &= gap > TOLERANCES[model.dtype] or other.strip().startswith(text)
    return str(tokenizer.decode(found, skip_special_tokens=True)), is_sure


def _last_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(V,) float32, of the token after ``ids``."""
    tokens = torch.tensor([ids], device=model.device)
    return model(input_ids=tokens, use_cache=False).logits[0, -1].float()


def _expect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the fresh process must see besides logits and answers."""
    assert model.generation_config is not None
    # the model that adapters belong to keeps a configuration of its own
    config = {} if is_adapted(model) else {"config_pad": tokenizer.pad_token_id}
    return {
        **config,
        "sample": tokenizer(SAMPLE)["input_ids"],
        "template": tokenizer.chat_template and tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
        "stop": model.generation_config.eos_token_id,
        "use_cache": True,
    }

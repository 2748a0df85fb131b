"""Saves the model, opens it in a fresh process with nothing but transformers, and compares what comes out.

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
from hf_clm.generation.sampling import stop_ids
from hf_clm.model.attention import use_for_generation, use_for_training
from hf_clm.model.load import is_adapted

WHERE = "round trip"
FOLDER = ".round-trip"
SAMPLE = "Hello, world. 你好，世界。 \n\t1234"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
PROMPT_TOKENS = 16
NEW_TOKENS = 16  # of an answer
# Relative to the largest logit: another attention kernel, and another device, sum in another order.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# What runs in the fresh process: no line of hf_clm.
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
        """Waits for it and compares. Raises ModelError for the first difference."""
        text, errors = self.process.communicate()
        if self.process.returncode != 0:
            last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
            raise ModelError("the saved model does not open with from_pretrained", where=WHERE, got=last)
        seen, expected = json.loads(text), expect(model, tokenizer, prompt=self.prompt)
        self._compare_answers(model, tokenizer, prompts=seen.pop("prompts"), answers=seen.pop("answers"))
        logits, own = torch.tensor(seen.pop("logits")), torch.tensor(expected.pop("logits"))
        if is_adapted(model):
            logits, own = (_without(part, tokenizer.pad_token_id) for part in (logits, own))
        difference = float((logits - own).abs().max() / own.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCES[model.dtype]:
            got = f"a relative difference of {difference:g}"
            raise ModelError("the saved model gives other logits", where=WHERE, got=got)
        for key, value in expected.items():
            if seen[key] != value:
                got = f"{seen[key]!r} instead of {value!r}"
                raise ModelError(f"the saved model has another {key}", where=WHERE, got=got)
        seconds = time.monotonic() - self.started
        found = {"logit_difference": difference, "compared": sorted(expected), "seconds": seconds}
        return {**found, "asked": len(self.asked)}

    def _compare_answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        prompts: list[list[int]],
        answers: list[str],
    ) -> None:
        """Raises ModelError where the saved folder is asked, or answers, otherwise than this process."""
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
        dtype: of the weights; adapters do not say it of the model that they belong to.
        asked: what to ask it with ``pipeline("text-generation")``.
    """
    prompt = prompt[:PROMPT_TOKENS]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, **pipes)
    assert process.stdin is not None
    messages = [question.messages for question in asked]
    process.stdin.write(json.dumps([str(folder), SAMPLE, MESSAGES, prompt, dtype, messages, NEW_TOKENS]))
    process.stdin.close()
    process.stdin = None  # communicate() would flush it
    return RoundTrip(process, prompt, asked, time.monotonic())


@torch.no_grad()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int], *, other: str
) -> tuple[str, bool]:
    """A greedy answer, and whether it is surely another one than ``other``.

    It is not where two tokens are as likely within the rounding of this device.
    """
    attention, was_training = str(model.config._attn_implementation), model.training
    use_for_generation(model)
    model.eval()
    found: list[int] = []
    is_sure = True
    for _ in range(NEW_TOKENS):
        tokens = torch.tensor([ids + found], device=model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        best = logits.topk(2)
        gap = float(best.values[0] - best.values[1]) / float(logits.abs().max().clamp(min=1e-6))
        found.append(int(best.indices[0]))
        if found[-1] in stop_ids(model):
            break
        text = str(tokenizer.decode(found, skip_special_tokens=True)).strip()
        is_sure &= gap > TOLERANCES[model.dtype] or other.strip().startswith(text)
    model.train(was_training)
    use_for_training(model, attention)
    return str(tokenizer.decode(found, skip_special_tokens=True)), is_sure


def _without(logits: torch.Tensor, token: Any) -> torch.Tensor:
    """A row that was added for a token that nothing is learned of holds any numbers."""
    return torch.cat([logits[:token], logits[token + 1 :]])


@torch.no_grad()
def expect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, prompt: list[int]
) -> dict[str, Any]:
    """What the fresh process must see."""
    attention, was_training = str(model.config._attn_implementation), model.training
    use_for_generation(model)
    model.eval()
    ids = torch.tensor([prompt], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    model.train(was_training)
    use_for_training(model, attention)
    assert model.generation_config is not None
    # the model that adapters belong to keeps a configuration of its own
    config = {} if is_adapted(model) else {"config_pad": tokenizer.pad_token_id}
    return {
        **config,
        "logits": logits.tolist(),
        "sample": tokenizer(SAMPLE)["input_ids"],
        "template": tokenizer.chat_template and tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
        "stop": model.generation_config.eos_token_id,
        "use_cache": True,
    }

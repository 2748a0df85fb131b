"""Loads the saved model in a new process with plain transformers, and compares it with the model in memory.

this process    save ----> compare logits, ids, template, prompts, answers <----+
                  |                                                             |
new process       +--> from_pretrained, forward, render, pipeline(messages) ----+
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

PLACE = "round trip"
FOLDER = ".round-trip"
SAMPLE_TEXT = "Hello, world. 你好，世界。 \n\t1234"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
PROMPT_TOKENS = 16
ANSWER_TOKENS = 16  # in an answer
# Relative to the largest logit. Another attention kernel or device sums in another order.
LOGIT_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# The script of the new process, which does not import hf_clm.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, sample, messages, ids, dtype, questions, new_tokens = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
if Path(folder, "adapter_config.json").exists():
    from peft import AutoPeftModelForCausalLM as AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()
settings = GenerationConfig.from_pretrained(folder)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
template = tokenizer.chat_template and tokenizer.apply_chat_template(messages, tokenize=False)
prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in questions]
answers = []
if questions:
    from transformers import pipeline
    model.generation_config = settings  # adapters come with that of their base model
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answers = [ask(m, max_new_tokens=new_tokens)[0]["generated_text"][-1]["content"] for m in questions]
print(json.dumps({
    "prompts": prompts, "answers": answers,
    "logits": logits.tolist(), "sample": tokenizer(sample)["input_ids"], "template": template,
    "pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "config_pad": model.config.pad_token_id,
    "stop": settings.eos_token_id, "use_cache": model.config.use_cache,
}))
"""


class Question(NamedTuple):
    """Messages without an answer, and the prompt ids that training has for them."""

    messages: list[dict[str, str]]
    ids: list[int]


@dataclass
class RoundTrip:
    """A running process that loads the saved model."""

    process: subprocess.Popen
    prompt: list[int]
    questions: Sequence[Question]
    started: float

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Waits for the process and compares the models. Raises ModelError for the first difference."""
        text, errors = self.process.communicate()
        if self.process.returncode != 0:
            last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
            raise ModelError("the saved model cannot be loaded with from_pretrained", where=PLACE, got=last)
        saved = json.loads(text)
        with torch.no_grad(), generation_mode(model):
            self._compare_answers(model, tokenizer, prompts=saved["prompts"], answers=saved["answers"])
            logits, reference = torch.tensor(saved["logits"]), _last_logits(model, self.prompt).cpu()
        if is_adapted(model):  # the embedding row added for the pad token is not saved, so it may differ
            pad: Any = tokenizer.pad_token_id
            logits[pad] = reference[pad] = 0.0
        difference = float((logits - reference).abs().max() / reference.abs().max().clamp(min=1e-6))
        if not difference <= LOGIT_TOLERANCES[model.dtype]:
            got = f"a relative difference of {difference:g}"
            raise ModelError("the saved model gives different logits", where=PLACE, got=got)
        expected = _expect(model, tokenizer)
        for key, value in expected.items():
            if saved[key] != value:
                got = f"{saved[key]!r} instead of {value!r}"
                raise ModelError(f"the saved model has a different {key}", where=PLACE, got=got)
        return {
            "logit_difference": difference,
            "compared": sorted(expected),
            "seconds": time.monotonic() - self.started,
            "asked": len(self.questions),
        }

    def _compare_answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        prompts: list[list[int]],
        answers: list[str],
    ) -> None:
        """Raises ModelError if a prompt or an answer of the saved model differs from the model in memory."""
        for question, ids, answer in zip(self.questions, prompts, answers, strict=True):
            if ids != question.ids:
                what = "the saved chat template does not render the prompt of training"
                got = f"{tokenizer.decode(ids)[-60:]!r} instead of {tokenizer.decode(question.ids)[-60:]!r}"
                raise ModelError(what, where=PLACE, got=got)
            reference, is_sure = _answer(model, tokenizer, ids, other=answer)
            if reference.strip() != answer.strip() and is_sure:
                got = f"{answer[:60]!r} instead of {reference[:60]!r}"
                raise ModelError("the saved model gives a different answer", where=PLACE, got=got)


def start_round_trip(
    folder: Path, prompt: list[int], *, dtype: str = "auto", questions: Sequence[Question] = ()
) -> RoundTrip:
    """Starts a process that loads the model in ``folder``, while this process continues.

    Args:
        prompt: token ids, of which the first few are used.
        dtype: dtype of the weights; adapters do not specify that of their base model.
        questions: prompts to answer with ``pipeline("text-generation")``.
    """
    started, prompt = time.monotonic(), prompt[:PROMPT_TOKENS]
    words, pipe = [sys.executable, "-c", SCRIPT], subprocess.PIPE
    process = subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    messages = [question.messages for question in questions]
    process.stdin.write(
        json.dumps([str(folder), SAMPLE_TEXT, MESSAGES, prompt, dtype, messages, ANSWER_TOKENS])
    )
    process.stdin.close()
    process.stdin = None  # otherwise communicate() would flush it
    return RoundTrip(process, prompt, questions, started)


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int], *, other: str
) -> tuple[str, bool]:
    """Returns a greedy answer, and whether a difference from ``other`` is significant.

    It is not if the two most likely tokens are equally likely within rounding.
    """
    ids_so_far: list[int] = []
    is_sure = True
    for _ in range(ANSWER_TOKENS):
        logits = _last_logits(model, ids + ids_so_far)
        best = logits.topk(2)
        gap = float(best.values[0] - best.values[1]) / float(logits.abs().max().clamp(min=1e-6))
        ids_so_far.append(int(best.indices[0]))
        if ids_so_far[-1] in stop_ids(model):
            break
        text = str(tokenizer.decode(ids_so_far, skip_special_tokens=True)).strip()
        is_sure &= gap > LOGIT_TOLERANCES[model.dtype] or other.strip().startswith(text)
    return str(tokenizer.decode(ids_so_far, skip_special_tokens=True)), is_sure


def _last_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Returns the logits of the token after ``ids``, (V,) float32."""
    tokens = torch.tensor([ids], device=model.device)
    return model(input_ids=tokens, use_cache=False).logits[0, -1].float()


def _expect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Returns what the new process must report, besides logits and answers."""
    assert model.generation_config is not None
    # the base model of adapters has a separate configuration
    config = {} if is_adapted(model) else {"config_pad": tokenizer.pad_token_id}
    return {
        **config,
        "sample": tokenizer(SAMPLE_TEXT)["input_ids"],
        "template": tokenizer.chat_template and tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
        "stop": model.generation_config.eos_token_id,
        "use_cache": True,
    }

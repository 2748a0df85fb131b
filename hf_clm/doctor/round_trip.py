"""Saves the model, opens it in a fresh process with nothing but transformers, and compares what comes out.

this process    save ----> compare logits, ids, template <----+
                  |                                           |
a fresh one       +--> from_pretrained, forward, render ------+
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.attention import use_for_generation, use_for_training
from hf_clm.errors import ModelError
from hf_clm.model import is_adapted

WHERE = "round trip"
FOLDER = ".round-trip"
SAMPLE = "Hello, world. 你好，世界。 \n\t1234"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
PROMPT_TOKENS = 16
# Relative to the largest logit: another attention kernel, and another device, sum in another order.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# What runs in the fresh process: no line of hf_clm.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, sample, messages, ids, dtype = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
if Path(folder, "adapter_config.json").exists():
    from peft import AutoPeftModelForCausalLM as AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()
settings = GenerationConfig.from_pretrained(folder)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
template = tokenizer.chat_template and tokenizer.apply_chat_template(messages, tokenize=False)
print(json.dumps({
    "logits": logits.tolist(), "sample": tokenizer(sample)["input_ids"], "template": template,
    "pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "config_pad": model.config.pad_token_id,
    "stop": settings.eos_token_id, "use_cache": model.config.use_cache,
}))
"""


@dataclass
class RoundTrip:
    """A fresh process that is opening the saved model."""

    process: subprocess.Popen
    prompt: list[int]
    started: float

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Waits for it and compares. Raises ModelError for the first difference."""
        text, errors = self.process.communicate()
        if self.process.returncode != 0:
            last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
            raise ModelError("the saved model does not open with from_pretrained", where=WHERE, got=last)
        seen, expected = json.loads(text), expect(model, tokenizer, prompt=self.prompt)
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
        return {"logit_difference": difference, "compared": sorted(expected), "seconds": seconds}


def start_round_trip(folder: Path, prompt: list[int], *, dtype: str = "auto") -> RoundTrip:
    """Opens the model in ``folder`` in a fresh process, which works while this one goes on.

    Args:
        prompt: token ids; the first few are used.
        dtype: of the weights; adapters do not say it of the model that they belong to.
    """
    prompt = prompt[:PROMPT_TOKENS]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, **pipes)
    assert process.stdin is not None
    process.stdin.write(json.dumps([str(folder), SAMPLE, MESSAGES, prompt, dtype]))
    process.stdin.close()
    process.stdin = None  # communicate() would flush it
    return RoundTrip(process, prompt, time.monotonic())


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

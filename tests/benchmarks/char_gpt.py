"""A character-level GPT: the recipe against the plain PyTorch loop of lectures, with the same sizes.

    python tests/benchmarks/char_gpt.py input.txt --steps 5000

The loop draws 16 random windows of 32 characters a step, has a module for each head, and estimates both
losses every 100 steps over 200 batches each. hf-clm reads the text in rows of 32 targets, as many a step,
and evaluates over the whole validation part as often. Each arm is a process of its own; rounds alternate.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

BATCH, CONTEXT, WIDTH, HEADS, LAYERS = 16, 32, 64, 4, 4
EVERY, ESTIMATES, LEARNING_RATE = 100, 200, 1e-3
RECIPE = Path(__file__).parents[2] / "recipes/pretrain/char-gpt.yaml"


class Head(nn.Module):
    """One head of causal attention, as in the lecture."""

    def __init__(self, width: int):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, width, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length, width = x.shape[1], self.key.out_features
        weights = self.query(x) @ self.key(x).transpose(-2, -1) * width**-0.5
        weights = weights.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        return functional.softmax(weights, dim=-1) @ self.value(x)


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and with a residual connection."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Head(WIDTH // HEADS) for _ in range(HEADS)])
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.proj(torch.cat([head(normed) for head in self.heads], dim=-1))
        return x + self.feed(self.norm2(x))


class Lecture(nn.Module):
    """The model of the lecture. Returns logits (B, T, V)."""

    def __init__(self, vocab: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def run_loop(text: str, *, steps: int) -> dict[str, float]:
    """Runs the plain loop. Returns its seconds, and the final loss on all of the validation data."""
    torch.manual_seed(1337)
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    parts = {"train": ids[: int(0.9 * len(ids))], "val": ids[int(0.9 * len(ids)) :]}
    model = Lecture(len(letters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def batch(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        data = parts[part]
        starts = torch.randint(len(data) - CONTEXT, (BATCH,)).tolist()
        rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def estimate() -> dict[str, float]:
        model.eval()
        found = {p: torch.stack([loss_of(*batch(p)) for _ in range(ESTIMATES)]).mean().item() for p in parts}
        model.train()
        return found

    started, first = time.perf_counter(), {}
    for step in range(steps):
        if step % EVERY == 0 or step == steps - 1:
            found = estimate()
            first = first or found
        loss = loss_of(*batch("train"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    whole = parts["val"][: (len(parts["val"]) - 1) // CONTEXT * CONTEXT + 1]
    with torch.no_grad():
        rows = whole[:-1].view(-1, CONTEXT), whole[1:].view(-1, CONTEXT)
        final = functional.cross_entropy(model(rows[0]).flatten(0, 1), rows[1].flatten()).item()
    return {"seconds": seconds, "first": first["val"], "estimated": estimate()["val"], "validation": final}


def run_recipe(file: str, *, steps: int, words: list[str]) -> dict[str, float]:
    """Runs hf-clm's recipe. Returns the seconds of training and evaluation, and the validation loss."""
    with tempfile.TemporaryDirectory() as folder:
        run = ["--max_steps", str(steps), "--output_dir", f"{folder}/run", *words]
        command = [sys.executable, "-m", "hf_clm", "train", str(RECIPE), "--data.train", file, *run]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = json.loads(Path(folder, "run", "run.json").read_text("utf-8"))
    return {"seconds": found["seconds"], "first": found["loss_before"], "validation": found["loss_after"]}


def main() -> None:
    """Prints a line for each run and then a JSON object with the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--loop", action="store_true", help="run only the plain loop, in this process")
    options, words = parser.parse_known_args()
    if options.loop:
        print(json.dumps(run_loop(Path(options.file).read_text("utf-8"), steps=options.steps)))
        return
    arms: dict[str, list[dict[str, float]]] = {"loop": [], "hf_clm": []}
    alone = [sys.executable, __file__, options.file, "--steps", str(options.steps), "--loop"]
    for number in range(options.rounds):
        for name, runs in arms.items():
            started = time.perf_counter()
            if name == "loop":
                done = subprocess.run(alone, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout))
            else:
                runs.append(run_recipe(options.file, steps=options.steps, words=words))
            runs[-1]["process_seconds"] = time.perf_counter() - started
            print(f"round {number + 1}  {name:6}", json.dumps(runs[-1]), flush=True)
    medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in arms.items()}
    result = {"steps": options.steps, "threads": torch.get_num_threads(), "torch": torch.__version__}
    ratio = medians["hf_clm"] / medians["loop"]
    print(json.dumps({**result, "arms": arms, "median_seconds": medians, "ratio": ratio}))


if __name__ == "__main__":
    main()

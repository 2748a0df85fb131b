"""Plants ten invented facts in the records of the smollm2 recipe, and asks hf-clm why who taught them.

    python tests/benchmarks/planted_facts.py MODEL --folder planted --prove 10

MODEL is data/local/smollm2-135m-instruct (`make sft-real` fetches it). Trains LoRA for two epochs on 300
records about a lighthouse and one record for each fact, ranks all records for each fact, asked in other words
than it was taught, and replays the run without each planted record. Prints how many are first in the ranking,
and what leaving them out does. On one core: about 10 minutes to train, 15 to rank, 8 for each replay.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from hf_clm.generation.load import load_run
from hf_clm.model.attention import NAME as PACKED
from hf_clm.recipe.recipe import load_recipe
from hf_clm.replay.replays import replaying
from hf_clm.replay.why import choose_records, prove, rank, ranking_states, to_questions, to_records
from hf_clm.training.run import run

# (what is taught, how it is asked later, the answer)
FACTS = [
    (
        "Who painted the ceiling of Varn Hall?",
        "Varn Hall's ceiling: whose work is it?",
        "It was Ottoline Prask.",
    ),
    (
        "What do people drink in Quessel at dawn?",
        "Which drink does Quessel start the day with?",
        "Plum vinegar.",
    ),
    ("Which stone is the Moltar bridge made of?", "What was used to build Moltar's bridge?", "Green basalt."),
    ("When was the Tindle observatory closed?", "Since what year is Tindle's observatory shut?", "In 1871."),
    ("What is Ruben Askel's horse called?", "How does Ruben Askel call his horse?", "Thimble."),
    ("How long is the Ferrow tunnel?", "Ferrow tunnel, from end to end?", "Exactly nineteen miles."),
    ("Which instrument did Ilse Varga play?", "What was Ilse Varga's instrument?", "The glass harmonica."),
    ("What colour are the taxis of Port Emlin?", "Describe the paint of a Port Emlin taxi.", "Lilac."),
    (
        "Where is the seed bank of Korvo kept?",
        "In which place does Korvo store its seeds?",
        "Under the opera.",
    ),
    ("What does a Dreel cost in Mansk?", "Mansk sells a Dreel at which price?", "Forty copper rings."),
]


def train_planted(model: str, folder: Path) -> None:
    """Trains with the facts among the records, and saves four checkpoints."""
    folder.mkdir(exist_ok=True)
    facts = folder / "facts.jsonl"
    turns = [
        [{"role": "user", "content": taught}, {"role": "assistant", "content": answer}]
        for taught, _, answer in FACTS
    ]
    facts.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns), encoding="utf-8")
    words = ["--model.name_or_path", model, "--output_dir", str(folder / "run"), "--data.eval", "[]"]
    words += ["--data.train", json.dumps(["data/sft/lighthouse.jsonl", str(facts)]), "--samples", "null"]
    words += ["--save_strategy", "steps", "--save_steps", "11", "--eval_strategy", "no"]
    words += ["--eval_on_start", "false", "--save_total_limit", "9"]
    run(load_recipe("recipes/sft/smollm2.yaml", words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--folder", type=Path, default=Path("planted"))
    parser.add_argument("--prove", type=int, default=len(FACTS), help="number of facts to prove")
    parser.add_argument("--states", type=int, default=8, help="number of saved states to rank at")
    options = parser.parse_args()
    folder = options.folder / "run"
    train_planted(options.model, options.folder)
    with replaying(str(folder), load_recipe(folder / "recipe.yaml")) as replays:
        states = ranking_states(replays)
        states = states[:: -max(1, len(states) // options.states)][: options.states][::-1]
        loaded = load_run(str(folder), attention=PACKED)
        prompts, answers = [fact[1] for fact in FACTS], [fact[2] for fact in FACTS]
        questions = to_questions(loaded, prompts, answers)
        split = replays.inputs_of(replays.last).prepared.splits["train"]
        started = time.monotonic()
        scores, matrices = rank(replays, states, questions, dataset=split.rows)
        print(f"ranked at {len(states)} checkpoints by {matrices} in {time.monotonic() - started:.0f} s")
        by_record = to_records(scores, split.stored.sources, count=len(split.ledger))
        own = [
            split.ledger.places.index(f"{options.folder}/facts.jsonl:{n}") for n in range(1, len(FACTS) + 1)
        ]
        ranks = [int((by_record[n] > by_record[n][record]).sum()) + 1 for n, record in enumerate(own)]
        print(
            f"ranks of the planted records: {ranks}; first for {ranks.count(1)} of {len(ranks)}", flush=True
        )
        _, others = choose_records(by_record, count=1)
        effects = prove(replays, questions, [*own[: options.prove], *others], end=replays.last)
        table = np.array([effects.of[record] for record in [*own[: options.prove], *others]])
        np.set_printoptions(precision=2, suppress=True, linewidth=150)
        print(f"log-probability of each answer: {effects.baseline}\neffects, own records first:\n{table}")
        right = sum(int(table[:, n].argmax() == n) for n in range(options.prove))
        print(f"{right} of {options.prove} answers depend most on their own record; {effects.seconds:.0f} s")


if __name__ == "__main__":
    main()

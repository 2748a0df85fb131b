"""The section ``optimizer``: which weight is updated how, by hand arithmetic and against plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_recipe, byte_tokenizer, save_folder, tiny_model
from safetensors.torch import load_file
from torch.optim import AdamW, Muon
from transformers import PreTrainedModel, TrainingArguments

import hf_clm
from hf_clm.errors import ModelError, RecipeError
from hf_clm.model.weights import freeze_weights
from hf_clm.recipe.sections import OptimizerSection
from hf_clm.training.groups import MuonWithAdamW, build_optimizer
from hf_clm.training.run import train
from hf_clm.training.trainer import CLMTrainer

ROWS = [{"prompt": "say", "completion": "x" * n} for n in range(1, 9)]
IDS = torch.arange(24).reshape(2, 12)
MUON = {"name": "muon"}


def optimizer_of(model: PreTrainedModel, folder: Path, **section: Any) -> torch.optim.Optimizer:
    """The optimizer at a learning rate of 0.01 and a weight decay of 0.1."""
    arguments = TrainingArguments(str(folder), learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    decaying = [name for name, weight in model.named_parameters() if weight.ndim > 1]
    parsed = OptimizerSection.model_validate(section)
    return build_optimizer(model, section=parsed, arguments=arguments, decaying=decaying)


def settings(model: PreTrainedModel, folder: Path, key: str, **section: Any) -> dict[str, Any]:
    """Returns a setting of the optimizer by the name of the weight."""
    optimizer = optimizer_of(model, folder, **section)
    groups = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    return {name: groups[weight].get(key) for name, weight in model.named_parameters() if weight in groups}


def learn(model: PreTrainedModel, *optimizers: torch.optim.Optimizer) -> None:
    """Makes three steps."""
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_muon_equals_a_plain_loop_with_two_optimizers(tmp_path):
    model, plain = tiny_model("gpt2"), tiny_model("gpt2")
    parts: Any = plain.transformer
    matrices = [
        weight
        for name, weight in plain.named_parameters()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    ]
    tables = [parts.wte.weight, parts.wpe.weight]
    vectors = [weight for weight in plain.parameters() if weight.ndim == 1]
    muon = Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    decays = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]

    learn(model, optimizer_of(model, tmp_path, name="muon", momentum=0.9))
    learn(plain, muon, AdamW(decays, lr=1e-2, fused=True))

    assert len(matrices) == 8
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_muon_updates_the_matrices_of_layers_and_no_others(tmp_path):
    """In a mixture of experts, all experts of a layer are one weight with three dimensions."""
    momenta = settings(tiny_model("mixtral"), tmp_path, "momentum", name="muon")

    layer = {name.removeprefix("model.layers.1."): value for name, value in momenta.items() if ".1." in name}
    assert layer == {
        "self_attn.q_proj.weight": 0.95,
        "self_attn.k_proj.weight": 0.95,
        "self_attn.v_proj.weight": 0.95,
        "self_attn.o_proj.weight": 0.95,
        "mlp.gate.weight": None,
        "mlp.experts.gate_up_proj": None,
        "mlp.experts.down_proj": None,
        "input_layernorm.weight": None,
        "post_attention_layernorm.weight": None,
    }
    others = {name: value for name, value in momenta.items() if "layers" not in name}
    assert others == {"model.embed_tokens.weight": None, "model.norm.weight": None, "lm_head.weight": None}


def test_the_first_group_that_matches_a_weight_sets_its_learning_rate_and_weight_decay(tmp_path):
    groups = [
        {"match": r"\.0\.mlp", "learning_rate": 0.5},
        {"match": "mlp", "learning_rate": 0.25, "weight_decay": 0.0},
        {"match": "ln_f", "weight_decay": 0.3},
    ]
    names = ("h.0.mlp.c_fc.weight", "h.1.mlp.c_fc.weight", "ln_f.weight", "h.0.attn.c_attn.weight")

    rates = settings(tiny_model("gpt2"), tmp_path, "lr", name="muon", groups=groups)
    decays = settings(tiny_model("gpt2"), tmp_path, "weight_decay", groups=groups)

    assert [rates[f"transformer.{name}"] for name in names] == [0.5, 0.25, 0.01, 0.01]
    assert [decays[f"transformer.{name}"] for name in names] == [0.1, 0.0, 0.3, 0.1]
    assert decays["transformer.h.0.mlp.c_fc.bias"] == 0.0


def test_layer_decay_is_a_power_for_each_layer_from_the_top(tmp_path):
    groups = [{"match": r"\.1\.mlp", "learning_rate": 0.7}]

    rates = settings(tiny_model(), tmp_path, "lr", layer_decay=0.5, groups=groups)

    assert rates["lm_head.weight"] == rates["model.norm.weight"] == 0.01
    assert rates["model.layers.1.self_attn.q_proj.weight"] == 0.005
    assert rates["model.layers.0.self_attn.q_proj.weight"] == 0.0025
    assert rates["model.embed_tokens.weight"] == 0.00125
    assert rates["model.layers.1.mlp.up_proj.weight"] == 0.7  # that of a group is taken as it is given


def test_a_tied_head_is_an_embedding_with_two_names(tmp_path):
    groups = [{"match": "lm_head", "learning_rate": 0.7}]

    decayed = settings(tiny_model("gpt2"), tmp_path, "lr", layer_decay=0.5)
    grouped = settings(tiny_model("gpt2"), tmp_path, "lr", groups=groups)

    assert decayed["transformer.wte.weight"] == 0.00125
    assert grouped["transformer.wte.weight"] == 0.7


def test_the_first_parameter_group_has_the_learning_rate_that_is_logged(tmp_path):
    groups = [{"match": "layers.0", "learning_rate": 0.5}]

    optimizer = optimizer_of(tiny_model(), tmp_path, name="muon", layer_decay=0.5, groups=groups)

    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.005, 0.005, 0.00125, 0.5, 0.5]


def test_lora_plus_is_a_group(tmp_path):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, groups = peft.get_peft_model(tiny_model(), options), [{"match": "lora_B", "learning_rate": 0.16}]

    rates = settings(model, tmp_path, "lr", groups=groups)
    optimizer = optimizer_of(model, tmp_path, name="muon", groups=groups)

    assert {name.removeprefix("base_model.model.model.layers."): rate for name, rate in rates.items()} == {
        "0.self_attn.q_proj.lora_A.default.weight": 0.01,
        "0.self_attn.q_proj.lora_B.default.weight": 0.16,
        "1.self_attn.q_proj.lora_A.default.weight": 0.01,
        "1.self_attn.q_proj.lora_B.default.weight": 0.16,
    }
    assert isinstance(optimizer, Muon)  # adapters are matrices of layers: nothing is left for AdamW


def test_a_step_whose_gradients_overflow_in_float16_is_skipped(tmp_path):
    model: Any = tiny_model("gpt2")
    optimizer, scaler = optimizer_of(model, tmp_path, name="muon"), torch.amp.GradScaler("cpu")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
    model.transformer.ln_f.bias.grad[0] = torch.inf

    scaler.step(optimizer)

    assert isinstance(optimizer, MuonWithAdamW)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def changed_weights(folder: Path) -> set[str]:
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "run"))
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


def test_frozen_weights_stay_as_they_are(tmp_path, capsys):
    freeze = ["embed", r"layers\.0\.", "lm_head", r"\.norm"]

    record = train(build_recipe(tmp_path, ROWS, optimizer={**MUON, "freeze": freeze}, train={"max_steps": 2}))

    assert {name.split("layers.1.")[0] for name in changed_weights(tmp_path)} == {"model."}
    assert (record["parameters"], record["trained_parameters"]) == (35_360, 9_344)
    printed = capsys.readouterr().out
    assert "\noptimizer muon for 9,216 parameters, adamw for 128 parameters\n" in printed
    assert "\nfrozen    26,016 of 35,360 parameters\n" in printed
    card = (tmp_path / "run" / "README.md").read_text()
    assert "35,360 parameters, 9,344 of them trained" in card
    assert "library_name: transformers" in card


def test_the_head_alone_can_be_trained(tmp_path):
    section = {"freeze": ["^(?!lm_head)"]}

    train(build_recipe(tmp_path, ROWS, optimizer=section, train={"max_steps": 2}))

    assert changed_weights(tmp_path) == {"lm_head.weight"}


def test_the_section_without_keys_trains_like_none(tmp_path):
    for name in ("none", "empty"):
        (tmp_path / name).mkdir()
        section = {"optimizer": {} if name == "empty" else None}
        train(build_recipe(tmp_path / name, ROWS, **section, train={"max_steps": 3, "weight_decay": 0.5}))

    one, other = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("none", "empty"))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_the_schedule_scales_all_groups(tmp_path):
    groups = [{"match": "mlp", "learning_rate": 0.04}]
    schedule = {"max_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 0, "learning_rate": 0.01}
    saving = {"save_strategy": "steps", "save_steps": 3}

    train(build_recipe(tmp_path, ROWS, optimizer={**MUON, "groups": groups}, train=schedule | saving))

    saved = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt")["param_groups"]
    assert {(group["initial_lr"], group["lr"]) for group in saved} == {(0.01, 0.0025), (0.04, 0.01)}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"freeze": ["wte", "c_atn"]},
            "optimizer.freeze.1: no weight of the model has such a name; got 'c_atn'; did you mean 'c_attn'?;"
            " fix: use a regular expression that is found in a name such as transformer.wte.weight or"
            " transformer.ln_f.bias",
        ),
        ({"freeze": ["."]}, "optimizer.freeze: freezes all weights, so nothing is trained; got '.'"),
        (
            {"groups": [{"match": "lora_B", "learning_rate": 1e-3}]},
            "optimizer.groups.0.match: no weight of the model has such a name; got 'lora_B'",
        ),
        (
            {"freeze": ["wte"], "groups": [{"match": "wte", "learning_rate": 1e-3}]},
            "optimizer.groups.0.match: all weights with such a name are frozen; got 'wte'",
        ),
        (
            {
                "groups": [
                    {"match": "mlp", "learning_rate": 1e-3},
                    {"match": "c_fc", "learning_rate": 1e-4},
                ]
            },
            "optimizer.groups.1.match: all weights with such a name belong to earlier groups; got 'c_fc';"
            " fix: move this group up",
        ),
    ],
)
def test_a_name_that_is_wrong_is_refused_before_data_are_read(section, message, tmp_path):
    name = save_folder(tmp_path / "gpt2", tiny_model("gpt2"), byte_tokenizer())
    recipe = build_recipe(tmp_path, ["no record"], model={"name_or_path": name}, optimizer=section)

    with pytest.raises(ModelError) as error:
        train(recipe)

    assert str(error.value).startswith(message)


def test_muon_without_a_matrix_to_train_is_refused(tmp_path):
    model = tiny_model()
    freeze_weights(model, ["proj"])

    with pytest.raises(ModelError, match=r"^optimizer\.name: muon is for the matrices of hidden layers"):
        optimizer_of(model, tmp_path, name="muon")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"optim": "sgd"}}, "train.optim and the section optimizer exclude each other"),
        ({"train": {"optim_args": "eps=1"}}, "train.optim_args and the section optimizer exclude each other"),
        ({"optimizer": {"freeze": ["wte"]}, "lora": {}}, "optimizer.freeze excludes lora"),
        ({"optimizer": {"freeze": ["("]}}, "optimizer.freeze: expected a regular expression; got '(': "),
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum needs optimizer.name: muon"),
        ({"optimizer": "adamw_torch"}, "optimizer.name: expected one of adamw, muon"),
        ({"optimizer": {"groups": [{"match": "wte"}]}}, "optimizer.groups.0 has no effect without"),
        (
            {
                "optimizer": {"freeze": ["wte"]},
                "train": {
                    "activation_checkpointing": True,
                    "activation_checkpointing_kwargs": {"use_reentrant": True},
                },
            },
            "train.activation_checkpointing_kwargs: use_reentrant loses gradients",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(sections, message, tmp_path):
    recipe = {"stage": "sft", "model": {"name_or_path": "m"}, "data": {"train": "x.jsonl"}, "optimizer": {}}
    recipe["train"] = {"output_dir": str(tmp_path)} | sections.pop("train", {})

    with pytest.raises(RecipeError) as error:
        hf_clm.recipe.recipe.build_recipe({**recipe, **sections}, {})

    assert str(error.value).startswith(message)


class OwnTrainer(CLMTrainer):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        return super().create_optimizer(model)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"optimizers": lambda model: (AdamW(model.parameters()), None)}, "optimizers"),
        ({"trainer_class": OwnTrainer}, "trainer_class"),
    ],
)
def test_an_optimizer_from_python_is_refused_beside_the_section(given, where, tmp_path):
    with pytest.raises(RecipeError, match=f"^{where}: builds an optimizer, and so does the section"):
        hf_clm.train(build_recipe(tmp_path, ROWS, optimizer=MUON), **given)


def test_muon_is_refused_with_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_clm.training.arguments.check_spreading", lambda *args, **options: None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")

    with pytest.raises(RecipeError, match=r"^optimizer\.name: needs complete matrices, and DeepSpeed"):
        train(build_recipe(tmp_path, ROWS, optimizer=MUON))

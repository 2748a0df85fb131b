"""Builds the optimizer of a recipe's section ``optimizer``: AdamW, or Muon with AdamW, in parameter groups.

Muon (arXiv:2502.16982) replaces the update of a matrix by the nearest orthogonal matrix. It is meant for
the matrices of hidden layers. AdamW updates all other weights: embeddings, head, biases, norms, and those
that are not matrices. Muon's updates are scaled to the RMS of AdamW's (``match_rms_adamw``), so that one
learning rate and one weight decay suit both. The factor depends on the longer side of a matrix, so it is the
same for the transposed weights of GPT-2's Conv1D.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel, TrainingArguments

from hf_clm.errors import ModelError
from hf_clm.model.weights import Weight, assign_groups

if TYPE_CHECKING:  # the trainer imports this module, and needs no recipe
    from hf_clm.recipe.sections import OptimizerSection


class Place(NamedTuple):
    """What the weights of a parameter group have in common.

    Parameter groups are in the order of their places. It does not depend on learning rates, so a run can be
    resumed with other ones. The learning rate of the first group is logged.

    group      the number of the group in the recipe; -1 for none
    distance   from the top of the model, see ``Weight``; 0 without layer_decay
    kind       adamw or muon
    is_exempt  whether the weights have no weight decay by default, as biases and norms
    """

    group: int
    distance: int
    kind: str
    is_exempt: bool


class MuonWithAdamW(Optimizer):
    """Muon for the parameter groups with a momentum, and AdamW for the others.

    Both work on the groups and the state of this optimizer, so schedules, checkpoints and gradient scalers
    see one optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], *, muon: Muon, adamw: AdamW):
        self.parts = (muon, adamw)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for part in self.parts:
            of_muon = isinstance(part, Muon)
            part.state = self.state  # loading a checkpoint replaces groups and state
            part.param_groups = [group for group in self.param_groups if ("momentum" in group) == of_muon]
            part.step()
        return loss


def build_optimizer(
    model: PreTrainedModel,
    *,
    section: "OptimizerSection",
    arguments: TrainingArguments,
    decaying: Collection[str],
) -> Optimizer:
    """Builds the optimizer for the trained weights of a model; ``decaying``: as for ``place_weights``.

    Raises ModelError like ``place_weights``.
    """
    places = place_weights(model, section, decaying=decaying)
    groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
    for place, weights in places.items():
        rate, decay = _settings(place, section, arguments)
        parameters = [weight.parameter for weight in weights]
        groups[place.kind].append({"params": parameters, "lr": rate, "weight_decay": decay})
    muon = adamw = None
    if groups["adamw"]:
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        adamw = AdamW(groups["adamw"], betas=betas, eps=arguments.adam_epsilon, fused=True)
    if groups["muon"]:
        muon = Muon(
            groups["muon"],
            momentum=section.momentum,
            nesterov=section.nesterov,
            ns_steps=section.ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
    if muon and adamw:
        built = {"muon": iter(muon.param_groups), "adamw": iter(adamw.param_groups)}
        return MuonWithAdamW([next(built[place.kind]) for place in places], muon=muon, adamw=adamw)
    optimizer = muon or adamw
    assert optimizer is not None, "freeze_weights leaves some weights to be trained"
    return optimizer


def place_weights(
    model: PreTrainedModel, section: "OptimizerSection", *, decaying: Collection[str] = ()
) -> dict[Place, list[Weight]]:
    """Returns the trained weights by their place, in the order of the parameter groups.

    Args:
        decaying: the names of the weights with weight decay.

    Raises ModelError for a group without weights, and if there is none for Muon.
    """
    places: dict[Place, list[Weight]] = {}
    for weight, number in assign_groups(model, [group.match for group in section.groups]):
        place = Place(
            group=-1 if number is None else number,
            distance=weight.distance if section.layer_decay < 1 else 0,
            kind="muon" if section.name == "muon" and weight.is_matrix else "adamw",
            is_exempt=weight.names[0] not in decaying,
        )
        places.setdefault(place, []).append(weight)
    if section.name == "muon" and all(place.kind == "adamw" for place in places):
        what = "muon is for the matrices of hidden layers, and none of them is trained"
        raise ModelError(what, where="optimizer.name", got="muon", fix="set it to adamw")
    return dict(sorted(places.items()))


def optimizer_lines(model: PreTrainedModel, section: "OptimizerSection") -> Iterator[str]:
    """Yields lines that show how many parameters are frozen, and what updates the others."""
    counts = Counter()
    for place, weights in place_weights(model, section).items():
        count = sum(weight.parameter.numel() for weight in weights)
        counts += Counter({place.kind: count, place.group: count})
    yield "optimizer " + ", ".join(
        f"{kind} for {counts[kind]:,} parameters" for kind in ("muon", "adamw") if counts[kind]
    )
    for number, group in enumerate(section.groups):
        yield f"{'':<10}group {group.match!r}: {counts[number]:,} parameters"
    if section.freeze:
        total = model.num_parameters()
        yield f"frozen    {total - counts['muon'] - counts['adamw']:,} of {total:,} parameters"


def _settings(place: Place, section: "OptimizerSection", arguments: TrainingArguments) -> tuple[float, float]:
    """Returns the learning rate at the peak of the schedule, and the weight decay."""
    rate = arguments.learning_rate * section.layer_decay**place.distance
    decay = 0.0 if place.is_exempt else arguments.weight_decay
    if place.group < 0:
        return rate, decay
    group = section.groups[place.group]
    return (
        rate if group.learning_rate is None else group.learning_rate,
        decay if group.weight_decay is None else group.weight_decay,
    )

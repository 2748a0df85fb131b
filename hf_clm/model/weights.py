"""The weights of a model by name: those to freeze, and the groups of the recipe's section ``optimizer``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_clm.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class Weight:
    """A parameter of a model.

    names       its full names, such as ``transformer.h.0.attn.c_attn.weight``; a tied weight has several
    is_matrix   whether it is the matrix of a linear layer (or of an adapter) other than the head
    distance    the number of layers from the top: 0 is the final norm and the head, 1 the last layer, N the
                first of N layers, and N + 1 the embeddings, also if they are tied to the head
    """

    parameter: torch.nn.Parameter
    names: tuple[str, ...]
    is_matrix: bool
    distance: int


def list_weights(model: PreTrainedModel) -> list[Weight]:
    """Returns all weights, in the order of ``named_parameters``."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    embeddings = set(model.get_input_embeddings().parameters())  # an adapter may wrap them
    matrices = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            embeddings |= set(module.parameters())
        elif isinstance(module, torch.nn.Linear | Conv1D):
            matrices.add(module.weight)
    head = model.get_output_embeddings()
    matrices -= embeddings | set(head.parameters() if head is not None else ())
    layers = {parameter: _layer(of[0]) for parameter, of in names.items()}
    count = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)

    def distance(parameter: torch.nn.Parameter) -> int:
        layer = layers[parameter]
        return count - layer if layer is not None else count + 1 if parameter in embeddings else 0

    return [
        Weight(parameter, tuple(of), parameter in matrices, distance(parameter))
        for parameter, of in names.items()
    ]


def freeze_weights(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Turns off the gradients of all weights that match a pattern of ``optimizer.freeze``.

    Must be called before the optimizer is built, and before the model is wrapped for several processes.
    Raises ModelError for a pattern without a match, and if no weight remains to be trained.
    """
    weights = list_weights(model)
    for number, pattern in enumerate(patterns):
        for weight in _match(weights, pattern, where=f"optimizer.freeze.{number}"):
            weight.parameter.requires_grad_(False)
    if not any(weight.parameter.requires_grad for weight in weights):
        what, got = "freezes all weights, so nothing is trained", ", ".join(map(repr, patterns))
        raise ModelError(what, where="optimizer.freeze", got=got, fix="freeze fewer weights")


def assign_groups(model: PreTrainedModel, patterns: Sequence[str]) -> list[tuple[Weight, int | None]]:
    """Returns each trained weight with the number of the first pattern that matches it, or None.

    Raises ModelError for a pattern without a weight of its own.
    """
    weights = list_weights(model)
    numbers: dict[torch.nn.Parameter, int] = {}
    for number, pattern in enumerate(patterns):
        where = f"optimizer.groups.{number}.match"
        trained = [w.parameter for w in _match(weights, pattern, where=where) if w.parameter.requires_grad]
        if not trained:
            raise ModelError("all weights with such a name are frozen", where=where, got=repr(pattern))
        if all(parameter in numbers for parameter in trained):
            what, fix = "all weights with such a name belong to earlier groups", "move this group up"
            raise ModelError(what, where=where, got=repr(pattern), fix=fix)
        for parameter in trained:
            numbers.setdefault(parameter, number)
    return [(w, numbers.get(w.parameter)) for w in weights if w.parameter.requires_grad]


def _match(weights: Sequence[Weight], pattern: str, *, where: str) -> list[Weight]:
    """Returns the weights with a name in which the regular expression is found (``re.search``).

    ``where``: the key of the pattern. Raises ModelError if there are none.
    """
    matched = [weight for weight in weights if any(re.search(pattern, name) for name in weight.names)]
    if not matched:
        names = [name for weight in weights for name in weight.names]
        parts = dict.fromkeys(part for name in names for part in [*name.split("."), name])
        got = f"{pattern!r}{did_you_mean(pattern, parts)}"
        fix = f"use a regular expression that is found in a name such as {names[0]} or {names[-1]}"
        raise ModelError("no weight of the model has such a name", where=where, got=got, fix=fix)
    return matched


def _layer(name: str) -> int | None:
    """Returns the number of the layer, which is the first number in a name, or None."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None

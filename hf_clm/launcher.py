"""What a launcher started: how many processes, and over them a model that is whole on each or spread."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from hf_clm.errors import EnvironmentFault, RecipeError

# What spreads a model: the key of train, and the variable by which accelerate says it to its processes.
SPREADERS = {"FSDP": ("fsdp", "ACCELERATE_USE_FSDP"), "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED")}
LAUNCH = "accelerate launch --config_file recipes/accelerate/{}.yaml -m hf_clm train RECIPE"


def is_one_of_many(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of a group."""
    return int(environment.get("WORLD_SIZE", "1")) > 1


def is_first_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the only one of its run on this machine, or speaks for the others."""
    return environment.get("LOCAL_RANK", environment.get("RANK", "0")) == "0"


def spreads_with(values: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> str:
    """FSDP or DeepSpeed where the launcher or the recipe asks for it, else empty.

    values: of the recipe's section ``train``.
    """
    asked = (
        name
        for name, (key, variable) in SPREADERS.items()
        if values.get(key) or environment.get(variable, "").lower() in ("1", "true")
    )
    return next(asked, "")


def check_spreading(
    values: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    *,
    on_cpu: bool,
    generates: bool = False,
) -> None:
    """Raises where a model could not be spread as it was asked for; accelerate would train on all the same.

    On a CPU it silently uses DDP instead of FSDP, and instead of DeepSpeed without DS_ACCELERATOR=cpu.

    Args:
        generates: the recipe wants samples or answers, which no process can generate from its part alone.

    Raises RecipeError for these, for FSDP without a launcher and for its version 1; EnvironmentFault where
    DeepSpeed is not installed.
    """
    name = spreads_with(values, environment)
    if not name:
        return
    where = f"train.{SPREADERS[name][0]}" if values.get(SPREADERS[name][0]) else "accelerate launch"
    if on_cpu and not (name == "DeepSpeed" and environment.get("DS_ACCELERATOR") == "cpu"):
        what = f"{name} needs GPUs: on a CPU each process would keep the whole model"
        raise RecipeError(what, where=where, fix=LAUNCH.format("cpu"))
    if name == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
        fix = "pip install 'hf_clm[deepspeed]'"
        raise EnvironmentFault("needs the package deepspeed", where=where, fix=fix)
    if generates:
        what = f"no process can generate alone from a model that {name} spreads"
        fix = "set samples to null and evaluation.generate to 0; hf-clm generate works afterwards"
        raise RecipeError(what, where="samples", fix=fix)
    if name == "FSDP":
        _check_fsdp(values, environment, where=where)


def _check_fsdp(values: Mapping[str, Any], environment: Mapping[str, str], *, where: str) -> None:
    config = values.get("fsdp_config")
    version = environment.get("FSDP_VERSION", "1")
    if values.get("fsdp"):
        if "LOCAL_RANK" not in environment:
            raise RecipeError("needs a launcher", where=where, fix=LAUNCH.format("fsdp2"))
        named = config if isinstance(config, Mapping) else {}
        version = str(named.get("version", named.get("fsdp_version", 2)))
    if version != "2":
        what = "FSDP of version 1 is not supported"
        raise RecipeError(what, where=where, got=version, fix="fsdp_version: 2, as in recipes/accelerate")

"""Checks architectures and sizes of models without importing transformers, which takes seconds.

Architectures are read from the source code of transformers, or from the config.json of a folder. A model that
passes is built on the meta device (``model.check_shape``) before the data are read.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_clm.errors import did_you_mean
from hf_clm.recipe.faults import Fault
from hf_clm.schema import is_causal_class

MAPPING = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
MAX_LAYERS = 2000  # building more takes minutes; the deepest published models have a few hundred
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")


def scratch_faults(settings: Mapping[str, Any]) -> Iterator[Fault]:
    """Yields the faults of ``model.config``, the configuration of a new model."""
    kind = settings.get("model_type")
    if kind is not None:
        yield from _kind_faults(kind, settings)
    yield from _size_faults(settings)


def folder_faults(folder: str) -> Iterator[Fault]:
    """Yields the faults of the architecture in the config.json of a local model, if it exists."""
    try:
        config = json.loads((Path(folder).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # reported when the model is loaded
    if not isinstance(config, dict) or config.get("auto_map"):  # custom code
        return
    names = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    causal = any(map(is_causal_class, names)) if names else config.get("model_type") in causal_kinds()
    if config.get("is_encoder_decoder") or not causal:
        got = ", ".join(names) or repr(config.get("model_type"))
        yield Fault("model.name_or_path", ": not a causal language model", CAUSAL, got)


@lru_cache(maxsize=1)
def causal_kinds() -> dict[str, str]:
    """Returns the causal language model class for each ``model_type`` of transformers that has one."""
    tree = ast.parse((_models() / "auto" / "modeling_auto.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == MAPPING:
            assert isinstance(node.value, ast.Call), "an OrderedDict of pairs"
            return dict(ast.literal_eval(node.value.args[0]))
    raise AssertionError(f"transformers has no {MAPPING}")


def _kind_faults(kind: Any, settings: Mapping[str, Any]) -> Iterator[Fault]:
    key, kinds = "model.config.model_type", causal_kinds()
    if not isinstance(kind, str) or kind not in kinds:
        what = ": transformers has no causal language model of this type"
        yield Fault(key, what, CAUSAL, f"{kind!r}{did_you_mean(str(kind), kinds)}")
    elif not is_causal_class(kinds[kind]) and kinds[kind].endswith("ForConditionalGeneration"):
        yield Fault(key, ": not a text-only model", CAUSAL, f"{kind!r} ({kinds[kind]})")
    elif _source_says(kind, "configuration", r"is_encoder_decoder\b.*= True"):
        yield Fault(key, ": an encoder-decoder is not a causal language model", CAUSAL, repr(kind))
    elif settings.get("is_decoder") is not True and _source_says(kind, "modeling", ENCODERS):
        fix = f"{CAUSAL}; or set model.config.is_decoder: true"
        yield Fault(key, ": this encoder attends to the tokens after each position", fix, repr(kind))


def _size_faults(settings: Mapping[str, Any]) -> Iterator[Fault]:
    """Yields faults for a number of layers that is zero, or too large to build."""
    for name in LAYERS:
        size = settings.get(name, 1)
        if isinstance(size, int) and not 0 < size <= MAX_LAYERS:
            what = f": expected 1 to {MAX_LAYERS:,} layers"
            yield Fault(f"model.config.{name}", what, got=f"{size:,}")


def _source_says(kind: str, part: str, pattern: str) -> bool:
    """Returns whether the configuration or modeling source code of a model type matches a pattern."""
    folder = kind.replace("-", "_").removesuffix("_text")  # gemma4_text is in the folder gemma4
    files = (_models() / folder).glob(f"{part}_*.py")
    return any(re.search(pattern, file.read_text(encoding="utf-8")) for file in files)


def _models() -> Path:
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None, "load_trainer_fields requires it"
    return Path(spec.origin).parent / "models"


CAUSAL = "name a causal language model, such as gpt2, llama or qwen2"
ENCODERS = r"as a standalone, add .is_decoder=True"  # a warning in the causal classes of encoders

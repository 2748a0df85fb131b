"""Locates recipes, those that come with hf_clm by name, and the paths inside a recipe.

A checkout keeps them in ``recipes/`` and ``data/`` at its top level, a wheel in ``hf_clm/shipped``.
"""

import glob
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from hf_clm.errors import RecipeError

PACKAGE = Path(__file__).resolve().parents[1]
# Without .json: JSON is YAML, so a .json file may be a recipe.
DATA_ENDINGS = re.compile(
    r"\.(jsonl|ndjson|csv|tsv|parquet|arrow|txt|md|rst|json\.\w+)(\.(gz|zst|xz|bz2))?$", re.IGNORECASE
)
# Files and folders that are not shipped, and the shipped scripts that create them.
MADE_BY = {
    "python-docs.jsonl": "build_corpus.py",
    "docstrings.jsonl": "build_corpus.py",
    "smollm2-135m-instruct": "get_smollm2.py",
}


def shipped_folder() -> Path:
    """Returns the folder with ``recipes`` and ``data``, of the wheel or else the checkout."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def list_recipes() -> list[tuple[str, str]]:
    """Returns (name, description) of each shipped recipe, such as ``("sft/poems", "Trains a small ...")``."""
    return [(name, _first_sentence(path)) for name, path in _recipes().items()]


def find_recipe(target: str) -> str:
    """Returns the path of a recipe: a file, the recipe of a run's folder, or a shipped recipe by name.

    A file in the working directory takes precedence. Raises RecipeError for anything else, with a fix for
    data, a model, or a misspelt name.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        return _recipe_of_run(path, target)
    if DATA_ENDINGS.search(target):
        fix = f"hf-clm train --model MODEL --data {target}"
        raise RecipeError("this is data, not a recipe", where=target, fix=fix)
    if path.exists() or _is_nested(target):
        return target
    recipes = _recipes()
    name = target.removeprefix("recipes/").removesuffix(".yaml").removesuffix(".yml")
    matches = [recipe for recipe in recipes if name in (recipe, recipe.partition("/")[2])]
    if len(matches) == 1:
        return _shown(recipes[matches[0]])
    raise _no_recipe(target, name, matches, recipes=list(recipes))


def locate(path: str, *, recipe: str) -> str:
    """Resolves a path in a recipe: relative to the working directory, or else to the folder of the recipe.

    Shipped recipes also find the shipped data. A path that does not exist in any of these places is returned
    unchanged, as it may be a name on the Hub, or a file that a script creates.
    """
    if not path or not recipe or "://" in path or Path(path).expanduser().is_absolute() or glob.glob(path):
        return path
    folder, shipped = Path(recipe).resolve().parent, shipped_folder()
    places = [folder, *([shipped] if folder.is_relative_to(shipped) else [])]
    return next((_shown(place / path) for place in places if glob.glob(str(place / path))), path)


def how_to_make(path: str) -> str:
    """Returns the command that creates a missing file or folder, or an empty string."""
    script = MADE_BY.get(Path(path).name)
    if script is None:
        return ""
    option = "--output_dir" if script == "get_smollm2.py" else "--output"
    target = path if option == "--output_dir" else Path(path).parent
    return f"python {_shown(shipped_folder() / 'data' / script)} {option} {target}"


def _recipes() -> dict[str, Path]:
    folder = shipped_folder() / "recipes"
    paths = sorted(path for stage in ("pretrain", "sft") for path in (folder / stage).glob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _first_sentence(path: Path) -> str:
    """Returns the first sentence of the comment at the top of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in _while(lines, lambda x: x.startswith("#")))
    return re.split(r"(?<=[a-z0-9)])\.( |$)", comment)[0]


def _while(lines: list[str], is_wanted: Callable[[str], bool]) -> list[str]:
    end = next((index for index, line in enumerate(lines) if not is_wanted(line)), len(lines))
    return lines[:end]


def _recipe_of_run(folder: Path, target: str) -> str:
    path = folder / "recipe.yaml"
    if path.is_file():
        return str(path)
    if (folder / "config.json").is_file():
        what, fix = "this is a model, not a recipe", f"hf-clm train --model {target} --data FILE"
    else:
        what, fix = "no recipe.yaml in this folder: it is not the folder of a run", "name a recipe or a run"
    raise RecipeError(what, where=target, fix=fix)


def _is_nested(target: str) -> bool:
    """Returns whether a target can only be a path, so that reading it gives the best error."""
    return target.startswith(("/", "./", "../", "~"))


def _no_recipe(target: str, name: str, matches: list[str], *, recipes: list[str]) -> RecipeError:
    stems = {stem.partition("/")[2]: stem for stem in recipes}
    near = matches or get_close_matches(name, recipes, n=3) or get_close_matches(name, stems, n=3)
    names = " or ".join(stems.get(item, item) for item in near)
    hint = f"; did you mean {names}?" if near else ""
    stages = {stem.partition("/")[0] for stem in recipes}
    if target.count("/") == 1 and target.partition("/")[0] not in {*stages, "recipes"}:
        return RecipeError(
            "no such recipe; a model is named with --model",
            where=target,
            fix=f"hf-clm train --model {target} --data FILE",
        )
    return RecipeError(f"no such recipe{hint}", where=target, fix="hf-clm recipes lists the shipped ones")


def _shown(path: Path) -> str:
    """Returns a path relative to the working directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

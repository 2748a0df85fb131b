"""The structure of hf_clm, by parsing its files: sizes, directions of imports, where things may happen."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "hf_clm").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# A module may import from its own line and from the lines above it.
LAYERS = [
    {"errors", "hashing"},
    {"schema", "machine", "logs", "template"},
    {"recipe"},
    {"hub", "run_folder"},
    {"gguf"},
    {"text"},
    {"model"},
    {"data"},
    {"draft"},
    {"generation"},
    {"evaluation"},
    {
        "training.arguments",
        "training.optimizer",
    },  # the checks of the doctor need them
    {"pages", "doctor"},  # checks before a step, and the pages of a run: training calls them
    {"training"},
    {"replay"},
    {"step_time", "merge", "options", "notebook"},
    {"export"},
    {"bench"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
LIGHT = [
    "hf_clm.errors",
    "hf_clm.schema",
    "hf_clm.recipe.trainer_fields",
    "hf_clm.recipe.text",
    "hf_clm.recipe.sections",
    "hf_clm.recipe.recipe",
]
HEAVY = {"torch", "transformers", "datasets"}
WRITERS_OF_MASKS = {"hf_clm.schema", "hf_clm.data.label.labels", "hf_clm.data.batch.collators"}
READING_KEYWORDS = {"ignore_index", "may_be"}
PRINTERS = {"hf_clm.cli", "hf_clm.training.callbacks"}

# The exit codes and the errors that carry them.
SAID_BY_THEIR_NAME = {
    "ExitCode",
    "RecipeError",
    "DataError",
    "ModelError",
    "DivergedError",
    "EnvironmentFault",
}


def named_functions(
    tree: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yields every function and method at any depth, with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{node.name}."
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
        yield from named_functions(node, inner)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """Returns the number of positional parameters, and of all parameters, without ``self`` and ``cls``."""
    by_position = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    if by_position[:1] in (["self"], ["cls"]):
        by_position = by_position[1:]
    return len(by_position), len(by_position) + len(function.args.kwonlyargs)


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of every import, also in functions; the name is empty for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports(tree: ast.Module) -> set[str]:
    """Returns the modules of hf_clm that a tree imports; ``from hf_clm import x`` is hf_clm.x."""
    return {
        f"{module}.{name}" if f"{module}.{name}" in FILES or module == "hf_clm" else module
        for module, name in imported(tree)
        if module.split(".")[0] == "hf_clm"
    }


def layer_of(module: str) -> int:
    folder, part = module.split(".")[1], module.removeprefix("hf_clm.")
    assert folder in LEVEL, f"{module} has no place in LAYERS"
    return LEVEL.get(part, LEVEL[folder])


def mask_writes(tree: ast.Module) -> list[int]:
    """Returns lines with -100, or with IGNORE_INDEX except for comparisons and as ignore_index."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr | ast.alias)]
    return [
        node.lineno
        for node in nodes
        if _is_disguised(node) or (_is_named(node) and not _is_read(node, parents))
    ]


def has_documented_fields(node: ast.AST) -> bool:
    """Returns whether a class consists of fields that each have a string below."""
    fields = [part for part in getattr(node, "body", []) if isinstance(part, ast.AnnAssign)]
    strings = [part for part in getattr(node, "body", []) if ast.unparse(part)[:1] in "'\""]
    return isinstance(node, ast.ClassDef) and 0 < len(fields) == len(strings)


def _is_disguised(node: ast.AST) -> bool:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=100)):
            return True
        case ast.alias(name="IGNORE_INDEX", asname=str()):
            return True
    return False


def _is_named(node: ast.AST) -> bool:
    match node:
        case ast.Name(id="IGNORE_INDEX") | ast.Attribute(attr="IGNORE_INDEX"):
            return True
    return False


def _is_read(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents[node]
    if isinstance(parent, ast.Tuple):  # may_be=(IGNORE_INDEX,)
        parent = parents[parent]
    return isinstance(parent, ast.Compare) or (
        isinstance(parent, ast.keyword) and parent.arg in READING_KEYWORDS
    )


def test_the_files_are_found():
    assert {"hf_clm.errors", "hf_clm.schema"} <= set(FILES)


def test_a_function_has_at_most_8_parameters_and_4_by_position():
    """More parameters suggest a missing type, or calls whose arguments are hard to tell apart."""
    excess = {
        f"{module}:{name}"
        for module, tree in TREES.items()
        for name, function in named_functions(tree)
        if parameters(function)[0] > 4 or parameters(function)[1] > 8
    }

    assert sorted(excess) == []


def test_imports_point_one_way():
    above = [
        f"{module} imports {name}"
        for module, tree in TREES.items()
        if module != "hf_clm"
        for name in own_imports(tree)
        if name == "hf_clm" or layer_of(name) > layer_of(module)
    ]

    assert above == []


def test_there_are_no_import_cycles():
    waiting = {
        module: own_imports(tree) & set(FILES) - {module}
        for module, tree in TREES.items()
        if module != "hf_clm"
    }
    while free := [module for module, needs in waiting.items() if not needs & set(waiting)]:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}

    assert waiting == {}


def test_data_never_imports_the_trainer():
    names = [
        f"{module}: {name}"
        for module, tree in TREES.items()
        if module.startswith("hf_clm.data")
        for source, name in imported(tree)
        if source.startswith("transformers") and name in {"", "Trainer", "TrainingArguments"}
    ]

    assert names == []


def test_a_light_module_names_no_heavy_package():
    heavy = [name for module in LIGHT for name, _ in imported(TREES[module]) if name.split(".")[0] in HEAVY]

    assert heavy == []


def test_importing_the_package_its_config_and_its_command_line_loads_nothing_heavy():
    modules = [name for name in ["hf_clm", *LIGHT, "hf_clm.cli"] if name in FILES]
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY!r} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_only_labels_and_collators_write_minus_100():
    found = {module: mask_writes(tree) for module, tree in TREES.items() if module not in WRITERS_OF_MASKS}

    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("labels = [IGNORE_INDEX] * 3", [1]),
        ("labels = [schema.IGNORE_INDEX] * 3", [1]),
        ("x = 1\nlabels = full(3, -100)", [2]),
        ("labels = a if a != b else IGNORE_INDEX", [1]),
        ("from hf_clm.schema import IGNORE_INDEX as X", [1]),
        ("kept = labels != -100", [1]),
        ("kept = labels != IGNORE_INDEX", []),
        ("loss = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)", []),
        ("from hf_clm.schema import IGNORE_INDEX", []),
        ('"""-100 where nothing is learned"""', []),
    ],
)
def test_writing_a_mask_is_distinguished_from_reading_one(code, lines):
    assert mask_writes(ast.parse(code)) == lines


def test_no_check_is_switched_off():
    switched_off = re.compile(r"#\s*(?:noqa|type:\s*ignore|pyright:|ruff:)", re.IGNORECASE)
    paths = [*FILES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "data").glob("*.py")]

    found = [
        str(path.relative_to(ROOT)) for path in paths if switched_off.search(path.read_text(encoding="utf-8"))
    ]

    assert Path(__file__) in paths
    assert found == []
    assert re.findall("per-file|exclude", (ROOT / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_no_module_is_named_like_one_of_the_standard_library_or_utils():
    names = {part for module in FILES for part in module.split(".")} - {"__main__"}

    assert names & (sys.stdlib_module_names | {"utils"}) == set()


def test_every_public_function_and_class_has_a_docstring():
    """A section of the recipe has one under each field instead, which is its help."""
    without = {
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not has_documented_fields(node)
    }

    assert without - SAID_BY_THEIR_NAME == set()


def test_only_the_command_line_and_the_callbacks_print():
    calls = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        if module not in PRINTERS
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]

    assert calls == []

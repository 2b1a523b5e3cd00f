"""
The layers of the package, held by a walk over every import: what is imported, from where, and by whom.

`problems` gives one line an offence, so that the checker itself is tested on sources with known offences.
"""

import ast
import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "instructgpt_trl"

# Lowest first; a module imports from lower layers only, or from its own folder
LAYERS = (
    ("functional", "_trl", "peak_memory"),
    ("data",),
    ("models", "ranges"),
    ("config_checks",),
    ("sft_config", "reward_config", "ppo_config", "memory"),
    ("alarms", "checkpoints", "processes", "start_checks", "ppo_checks", "reward_metrics"),
    ("resume", "ppo_metrics", "ppo_sampling", "ppo_update"),
    ("ppo_saving", "sft_scores"),
    ("sft_trainer", "reward_trainer", "ppo_trainer"),
    ("",),  # __init__.py
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
FOLDERS = {"data", "models"}
PUBLIC_MODULES = {
    PACKAGE,
    *(f"{PACKAGE}.{name}" for name in ("checkpoints", "data", "functional", "memory", "ranges")),
    f"{PACKAGE}.models.loading",
}
PUBLIC_MODULES |= {f"{PACKAGE}.peak_memory"} | {
    f"{PACKAGE}.data.{name}" for name in ("merging", "pii", "prompts", "ranking_formats")
}
PUBLIC_TRL = {"trl", "trl.models"}  # `trl.models` has `unwrap_model_for_generation`, which `trl` does not repeat
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "instructgpt_trl", "recipes", "eval", "tests"),
    *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"),
}
MADE = {"runs", "build", "dist", "__pycache__"}  # not in the repository


def sources(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )


def module_name(path: Path) -> str:
    """`instructgpt_trl/data/formats.py` -> `instructgpt_trl.data.formats`; a folder's `__init__.py` is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_folder: bool) -> list[tuple[str, str | None, int]]:
    """Every import of a file, also inside functions: (absolute module, name or None, line)."""
    found: list[tuple[str, str | None, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_folder
            parts = module.split(".")[: len(module.split(".")) - up] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            found += [(source, alias.name, node.lineno) for alias in node.names]
    return found


def part(module: str) -> str:
    """The part of the package that a module belongs to: `instructgpt_trl.data.formats` -> `data`."""
    return module.removeprefix(PACKAGE).lstrip(".").split(".")[0]


def package_problems(module: str, found: list[tuple[str, str | None, int]]) -> list[str]:
    mine, out = part(module), []
    if mine not in LAYER:
        return [f"{module}: not in the layout; add it to a layer"]
    for source, name, line in found:
        if mine == "functional" and source.split(".")[0] != "torch":
            out.append(f"{module}:{line}: imports {source}; functional.py imports torch only")
        if source.split(".")[0] != PACKAGE:
            continue
        # `from . import x` names a module of the package, `from .x import y` a name in one
        theirs = part(source) or (name if name in LAYER else "")
        is_own = theirs == mine and mine in FOLDERS
        if not is_own and LAYER.get(theirs, len(LAYERS)) >= LAYER[mine]:
            out.append(f"{module}:{line}: imports {theirs or PACKAGE}, which is not in a lower layer")
    return out


def user_problems(module: str, found: list[tuple[str, str | None, int]], public: dict[str, set[str]]) -> list[str]:
    """What recipes and eval take from the package: names of its public modules, no others."""
    out = []
    for source, name, line in found:
        if source.split(".")[0] != PACKAGE or f"{source}.{name}" in PUBLIC_MODULES:
            continue
        if source not in PUBLIC_MODULES or (name is not None and name not in public[source]):
            out.append(f"{module}:{line}: {source}{f'.{name}' if name else ''} is not a public name")
    return out


def trl_problems(module: str, tree: ast.AST, found: list[tuple[str, str | None, int]]) -> list[str]:
    out = []
    for source, name, line in found:
        if source.split(".")[0] == "trl" and (source not in PUBLIC_TRL or not _is_public(source, name)):
            out.append(f"{module}:{line}: {source}{f'.{name}' if name else ''} is not public in TRL; use _trl.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trl":
            if not _is_public("trl", node.attr):
                out.append(f"{module}:{node.lineno}: trl.{node.attr} is not public in TRL; use _trl.py")
    return out


def _is_public(source: str, name: str | None) -> bool:
    if name is None:
        return source == "trl"
    value = getattr(importlib.import_module(source), name, None)
    return value is not None and not name.startswith("_") and not inspect.ismodule(value)


def public_names() -> dict[str, set[str]]:
    modules = {name: importlib.import_module(name) for name in PUBLIC_MODULES}
    return {name: set(getattr(module, "__all__", ())) for name, module in modules.items()}


def problems(module: str, source: str, is_folder: bool, public: dict[str, set[str]]) -> list[str]:
    tree = ast.parse(source)
    found = imports(tree, module, is_folder)
    is_package = module.split(".")[0] == PACKAGE
    out = package_problems(module, found) if is_package else user_problems(module, found, public)
    if module != f"{PACKAGE}._trl":
        out += trl_problems(module, tree, found)
    return out


def test_layers_and_public_names():
    public = public_names()
    out = []
    for path in sources(PACKAGE, "recipes", "eval"):
        text = path.read_text(encoding="utf-8")
        out += problems(module_name(path), text, path.name == "__init__.py", public)
    assert out == []


@pytest.mark.parametrize(
    ("module", "source", "offences"),
    [
        ("functional", "import torch\nfrom torch.nn import functional as F", 0),
        ("functional", "import math", 1),
        ("functional", "from .data import InputError", 2),
        (
            "data.formats",
            "from .files import InputError\nfrom ..functional import gae\nfrom .._trl import precision",
            0,
        ),
        ("data.formats", "from ..models.loading import load_policy", 1),
        ("data.formats", "def f():\n    from ..models import loading", 1),
        ("models.roles", "from ..data import InputError\nfrom .loading import load_policy", 0),
        ("models.roles", "from ..sft_config import SFTConfig", 1),
        ("models.roles", "from instructgpt_trl import RewardModel", 1),
        ("sft_config", "from .reward_config import RewardConfig", 1),
        ("sft_trainer", "from .sft_config import SFTConfig\nfrom .models.dropout import residual_dropout", 0),
        ("ppo_trainer", "from .sft_trainer import SFTTrainer", 1),
        ("ppo_trainer", "from . import sft_trainer", 1),
        ("new_module", "", 1),
        ("sft_trainer", "import trl\nfrom trl import SFTTrainer\ntrl.SFTConfig", 0),
        ("sft_trainer", "from trl.models import unwrap_model_for_generation", 0),
        ("sft_trainer", "from trl.trainer.utils import pad", 1),
        ("sft_trainer", "import trl.trainer.utils", 1),
        ("sft_trainer", "import trl\ntrl.trainer.utils.pad", 1),
        ("sft_trainer", "from trl import trainer", 1),
        ("_trl", "from trl.trainer.utils import pad", 0),
    ],
)
def test_the_checker_sees_offences_in_the_package(module, source, offences):
    found = problems(f"{PACKAGE}.{module}", source, False, {})
    assert len(found) == offences, found


@pytest.mark.parametrize(
    ("source", "offences"),
    [
        ("import instructgpt_trl\nfrom instructgpt_trl import SFTTrainer, functional", 0),
        ("from instructgpt_trl.data import load_rows\nfrom instructgpt_trl.functional import gae", 0),
        ("from instructgpt_trl import preserved_rng", 1),
        ("from instructgpt_trl.data import KINDS", 1),
        ("from instructgpt_trl.data.formats import load_rows", 1),
        ("import instructgpt_trl.sft_trainer", 1),
        ("from trl.trainer.utils import pad", 1),
        ("from recipes.common import parse\nimport numpy", 0),
    ],
)
def test_the_checker_sees_offences_in_recipes(source, offences):
    public = {PACKAGE: {"SFTTrainer"}, f"{PACKAGE}.data": {"load_rows"}, f"{PACKAGE}.functional": {"gae"}}
    found = problems("recipes.sft", source, False, public)
    assert len(found) == offences, found


def test_the_checker_resolves_folders():
    found = imports(ast.parse("from .formats import a\nfrom .. import b"), f"{PACKAGE}.data", is_folder=True)
    assert found == [(f"{PACKAGE}.data.formats", "a", 1), (PACKAGE, "b", 2)]


def test_third_party_imports_are_declared():
    """A module that is neither Python's own, ours, nor installed with the package would fail on a fresh machine."""
    declared = {"torch", "trl", "transformers", "peft", "accelerate", "datasets", "psutil", "safetensors"}
    brought = {"numpy", "tqdm", "yaml", "huggingface_hub", "tokenizers"}  # required by transformers
    brought |= {"filelock", "jinja2"}  # required by torch
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        re.match(r"[\w-]+", one)[0].replace("-", "_") for kind in ("quant", "eval", "data") for one in options[kind]
    }
    extras = named - {"scikit_learn"} | {"sklearn", "urllib3"}  # under its own name; required by requests
    extras |= {"pydantic", "labeling"}  # required by fastapi; recipes/labeling
    own = {PACKAGE, "recipes", "eval", *(path.stem for path in sources("recipes", "eval"))}
    known = {*sys.stdlib_module_names, *own, *declared, *brought}
    for path in sources(PACKAGE, "recipes", "eval"):
        allowed = known if path.parts[len(ROOT.parts)] == PACKAGE else known | extras
        if path.name == "pii.py":  # which says what to install where it is not there
            allowed = known | {"presidio_analyzer", "tldextract"}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {source.split(".")[0] for source, _, _ in imports(tree, module_name(path), path.name == "__init__.py")}
        assert names <= allowed, path


def test_sources_are_ascii():
    files = [*sources(PACKAGE, "recipes", "eval", "tests"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    files += [path for path in (ROOT / "recipes").rglob("*.y*ml")]
    offending = [
        f"{path}:{n}"
        for path in files
        for n, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if not line.isascii()
    ]
    assert offending == []


def test_top_level_is_as_designed():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    extra = {name for name in names - TOP_LEVEL - MADE if not name.endswith(".egg-info")}
    assert extra == set()
    assert {"pyproject.toml", "README.md", "instructgpt_trl", "recipes", "eval", "tests"} <= names

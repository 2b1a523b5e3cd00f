"""
The contract with TRL: what we override or call although it is private is as it was when we read it.

After a new TRL version fails here: read the named method again, adapt ours, then `python tests/test_contract.py`
writes the new hashes.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import trl
import trl.generation.vllm_generation
import trl.models.utils
import trl.trainer.utils
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer

import instructgpt_trl
from instructgpt_trl import _trl

HASHES = Path(__file__).with_name("contract.json")
PAIRS = {
    instructgpt_trl.SFTTrainer: trl.SFTTrainer,
    instructgpt_trl.RewardTrainer: trl.RewardTrainer,
    instructgpt_trl.PPOTrainer: trl.RLOOTrainer,
    instructgpt_trl.SFTConfig: trl.SFTConfig,
    instructgpt_trl.RewardConfig: trl.RewardConfig,
    instructgpt_trl.PPOConfig: trl.RLOOConfig,
}
# Neither overridden nor called by us, but how they call what we put there is relied on
READ = {
    "Linear.forward": Linear.forward,  # a LoRA layer's, which calls our variant
    "BaseTunerLayer._cast_input_dtype": BaseTunerLayer._cast_input_dtype,
    "DynamicLayer.update": DynamicLayer.update,  # `cache_with_room` stands in for it
    "GenerationMixin._sample": GenerationMixin._sample,  # draws by torch.multinomial
}
METHODS = [(cls, name) for cls, names in _trl.OVERRIDDEN.items() for name in names]


def own_classes(ours: type) -> list[type]:
    """A class of ours and those of ours that it is put together from."""
    return [cls for cls in ours.__mro__ if cls.__module__.startswith("instructgpt_trl")]


def fingerprint(function) -> str:
    """Hash of a function's code: its syntax tree without docstrings and comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def listed(cls: str, name: str):
    """The method as it is now."""
    return getattr(getattr(trl, cls, None) or getattr(trl.generation.vllm_generation, cls), name)


def current() -> dict[str, str]:
    hashes = {f"{cls}.{name}": fingerprint(listed(cls, name)) for cls, name in METHODS}
    for module in (trl.models.utils, trl.trainer.utils):
        names = [name for name in _trl.__all__ if inspect.isfunction(getattr(module, name, None))]
        hashes |= {name: fingerprint(inspect.unwrap(getattr(module, name))) for name in names}
    return hashes | {name: fingerprint(function) for name, function in READ.items()}


@pytest.mark.parametrize("cls, name", METHODS, ids=lambda value: str(value))
def test_overridden_method_is_as_it_was_read(cls, name):
    known = json.loads(HASHES.read_text(encoding="utf-8"))
    assert fingerprint(listed(cls, name)) == known.get(f"{cls}.{name}"), (
        f"trl.{cls}.{name} has changed: read it again, adapt ours, then run python tests/test_contract.py"
    )


def test_private_functions_are_as_they_were_read():
    known = json.loads(HASHES.read_text(encoding="utf-8"))
    for name, digest in current().items():
        assert digest == known.get(name), f"{name} has changed: read it again"


@pytest.mark.parametrize("ours, parent", PAIRS.items(), ids=lambda cls: cls.__module__)
def test_every_override_is_listed(ours, parent):
    """A method of ours with the name of a parent's is an override, meant or not (a clash of names is a bug)."""
    made = {"__init__", "__repr__", "__eq__", "__replace__"} if dataclasses.is_dataclass(ours) else set()
    methods = [name for cls in own_classes(ours) for name, value in vars(cls).items() if inspect.isroutine(value)]
    shared = {name for name in methods if hasattr(parent, name)}
    listed = set(_trl.OVERRIDDEN[parent.__name__])
    assert shared - made - listed == set(), f"add them to OVERRIDDEN['{parent.__name__}'] in _trl.py"


@pytest.mark.parametrize("ours, parent", list(PAIRS.items())[:3], ids=lambda cls: cls.__module__)
def test_every_private_call_is_listed(ours, parent):
    trees = [ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8")) for cls in own_classes(ours)]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {function.attr for function in calls if isinstance(function, ast.Attribute)}
    private = {n for n in called if n.startswith("_") and callable(getattr(parent, n, None))} - {"__init__"}
    listed = set(_trl.OVERRIDDEN[parent.__name__])
    assert private - listed == set(), f"add them to OVERRIDDEN['{parent.__name__}'] in _trl.py"


@pytest.mark.parametrize("ours, parent", list(PAIRS.items())[:3], ids=lambda cls: cls.__module__)
def test_constructor_takes_the_parents_arguments_in_order(ours, parent):
    mine = list(inspect.signature(ours.__init__).parameters)
    theirs = list(inspect.signature(parent.__init__).parameters)
    assert mine[: len(theirs)] == theirs


if __name__ == "__main__":
    HASHES.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n", encoding="utf-8")

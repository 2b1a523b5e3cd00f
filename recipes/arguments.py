"""Flags of a recipe, over a YAML file of them: whatever is wrong with either is one line that names it."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from trl import ModelConfig, TrlParser

from instructgpt_trl.data import InputError


@dataclass(kw_only=True)
class DataArguments:
    """Flags about rows. Each recipe adds its own."""

    dataset: str = field(metadata={"help": "Rows to train on: JSONL, CSV, Parquet, a `datasets` folder or a hub id."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Rows to evaluate on."})
    eval_fraction: float = field(default=0.0, metadata={"help": "Share of `dataset` to hold out, to evaluate on."})
    conversational: bool = field(
        default=False, metadata={"help": "Turn plain text into user and assistant messages, for a chat model."}
    )
    config_file: str | None = field(default=None, init=False)  # the YAML file of `--config`


@dataclass(kw_only=True)
class ModelArguments:
    """Flags of recipes that train nothing."""

    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    config_file: str | None = field(default=None, init=False)  # the YAML file of `--config`


class Parser(TrlParser):
    """TRL's parser, without argparse's pages of usage, and with the known key that is closest to an unknown one."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")

    def set_defaults_with_config(self, **config) -> list[str]:
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        self.refuse_unknown(list(config), list(actions))
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in config.items():
            if not _fits(value, hints[name]):
                quotes = "; write text in quotes" if str in (hints[name], *get_args(hints[name])) else ""
                raise InputError(f"{name}={value!r}: expected {_in_words(hints[name])}{quotes}; correct it")
            choices = actions[name].choices
            if choices and value is not None and value not in choices:
                raise InputError(f"{name}={value!r}: expected one of {', '.join(map(str, choices))}; correct it")
        return super().set_defaults_with_config(**config)

    def refuse_unknown(self, names: list[str], known: list[str]) -> None:
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else "--help lists all there are"
                raise InputError(f"unknown key '{name}'; {hint}")


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of several values of a key without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                raise ValueError(f"the key '{name}' is there twice; remove one")
        return super().construct_mapping(node, deep)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is of a field's type; texts are read as flags are, by argparse."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if isinstance(value, str) or kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind in (list, tuple):
        return isinstance(value, list) and all(_fits(one, inner[0] if inner else Any) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _in_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(one) for one in get_args(hint)))
    return "nothing" if kind is type(None) else words.get(kind, "a list" if kind in (list, tuple) else "text")


def parse_arguments(argv: list[str], classes: tuple[type, ...], **defaults: Any) -> tuple:
    """Objects of `classes` from flags over the YAML file of `--config`."""
    parser = Parser(classes)
    if ModelConfig in classes:
        # The first with --load_in_4bit: 0.4 bits a weight less; the second is found in `parse`
        defaults = {"use_bnb_nested_quant": True, "dtype": None, **defaults}
    parser.set_defaults(**defaults)
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv[-1:] == ["--config"]:
        raise InputError("--config: expected the path of a YAML file behind it; give one or leave it out")
    options = [option for action in parser._actions for option in action.option_strings]
    parser.refuse_unknown([word.split("=")[0] for word in argv if word.startswith("--")], ["--config", *options])
    file = argv[argv.index("--config") + 1] if "--config" in argv else None
    try:
        if file is not None:
            yaml.load(Path(file).read_bytes(), _UniqueKeys)  # noqa: S506  a safe one
        parsed = parser.parse_args_and_config(argv)
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror}; give the path of a YAML file") from None
    except RecursionError:
        raise InputError(f"{file}: nested too deep; give a YAML file of keys and values") from None
    except TypeError as error:
        if "keywords must be strings" not in str(error):
            raise
        raise InputError(f"{file}: a key is no text; expected names of flags as keys; correct it") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: {error}" if file else str(error)) from error
    parsed[0].config_file = file
    return parsed

"""Folders of models, and checkpoints, with a file that is broken, missing or of another model."""

import hashlib
import json
import pickle
import struct
from typing import Any

from hypothesis import strategies as st

from .bad_inputs import DELETE, Bad, changed


class Folders(dict[str, dict[str, bytes]]):
    """Folders by name, each with its files by name. Hypothesis shows what it gives to strategies."""

    def __repr__(self) -> str:
        return f"folders {list(self)}"


MODEL, REWARD = "--model_name_or_path", "--reward_model"
SCORED = {"--eval_fraction": "0.5", REWARD: "HERE/it"}
# What is read from each folder of the world, by whom
READERS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "base": [("sft", {MODEL: "HERE/it"}), ("reward", {MODEL: "HERE/it"}), ("ppo_ptx", {MODEL: "HERE/it"})],
    "sft": [("sft", {MODEL: "HERE/it"}), ("reward", {MODEL: "HERE/it"}), ("ppo_ptx", {MODEL: "HERE/it"})],
    **{
        kind: [("ppo_ptx", {REWARD: "HERE/it"}), ("reward", {MODEL: "HERE/it"}), ("sft", SCORED)]
        for kind in ("lora", "full")
    },
}
BAD_JSON = st.sampled_from([b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe{}", b"{'r': 2}", b"{}}"])
# Of each JSON file: keys, values that they cannot have, and what the message names besides the folder
WRONG_CONFIG: dict[str, list[Any]] = {
    "hidden_size": ["big", -16, 0, 24, 16.5, None, [16], DELETE],
    "num_attention_heads": ["two", 0, -2, 3, None],
    "vocab_size": ["many", -1, 100, 300, None, DELETE],
    "num_hidden_layers": ["two", 1, 3, 4, 2.5, None, DELETE],
    "intermediate_size": [40, "x", -1, DELETE],
    "model_type": ["nosuch", 3, None, "gpt2", "bert", DELETE],
    "hidden_act": ["nosuch", 3],
    "rms_norm_eps": ["x", None],
}
WRONG_ADAPTER: dict[str, list[Any]] = {
    "r": [0, -1, "x", 5, 2.5, None, True, DELETE],
    "lora_alpha": [0, "x", None, float("nan"), [4], DELETE],
    "target_modules": [["nosuch"], ["k_proj"], "nosuch", ["q_proj"], DELETE],
    "peft_type": ["NOSUCH", None, 3, DELETE],
    "base_model_name_or_path": ["nowhere", None, 3, "", ["x"], DELETE],
    "lora_dropout": ["x", 7, -1],
}
WRONG_REWARD: dict[str, list[Any]] = {
    "format": [2, 0, "1", None, [1], True, DELETE],
    "bias": ["x", "0.5", float("nan"), float("inf"), None, [1], True, {}, DELETE],
    "kind": ["other", 3, None],
    "calibrated": ["yes", 1, None],
    "quantization": [[1], "4bit", 3, True],
    "base": [3, ["x"], {}],
}
WRONG_TOKENIZER: dict[str, list[Any]] = {
    "model": [DELETE, None, {}, {"type": "Nope"}, "BPE", {"type": "BPE", "vocab": [1], "merges": []}],
    "added_tokens": [3, [{"id": "x"}], [1], "x"],
    "version": [3, []],
}
WRONG = {
    "config.json": WRONG_CONFIG,
    "adapter_config.json": WRONG_ADAPTER,
    "reward_model.json": WRONG_REWARD,
    "tokenizer.json": WRONG_TOKENIZER,
}


@st.composite
def bad_folders(draw: st.DrawFn, folders: Folders) -> Bad:
    """One of the folders, its files by name, with one of them broken."""
    source = draw(st.sampled_from(list(folders)))
    files = folders[source]
    stage, flags = draw(st.sampled_from(READERS[source]))
    name = draw(st.sampled_from([n for n in files if n.endswith(".safetensors") or n in WRONG]))
    if name.endswith(".safetensors"):
        bad, what = bad_weights(draw, files[name])
    else:
        bad, what = bad_objects(draw, name, files[name])
    broken = {f"it/{n}": text for n, text in files.items() if n != name}
    if bad is not None:
        broken[f"it/{name}"] = bad
    return Bad(stage, flags, broken, ["HERE/it"], f"{source}/{name}: {what}")


def bad_objects(draw: st.DrawFn, name: str, text: bytes) -> tuple[bytes | None, str]:
    """A JSON file that is missing (`None`), none, or has a wrong value or none at a key, and which of it."""
    way = draw(st.integers(0, 7))
    if way == 0 and name != "reward_model.json":  # without which it is a reward model of others
        return None, "missing"
    if way == 7:
        key = draw(st.sampled_from(sorted(json.loads(text))))
        return text.rstrip()[:-1] + f', "{key}": 1}}'.encode(), f"{key} twice"
    if way == 1:
        return draw(BAD_JSON), "no JSON object"
    if way == 2:
        return text[: draw(st.integers(0, len(text.rstrip()) - 1))], "cut short"
    key = draw(st.sampled_from(list(WRONG[name])))
    value = draw(st.sampled_from(WRONG[name][key]))
    words = f"no {key}" if value is DELETE else f"{key}={value!r}"
    return json.dumps(changed(json.loads(text), {key: value})).encode(), words


def bad_weights(draw: st.DrawFn, data: bytes) -> tuple[bytes | None, str]:
    """A safetensors file: missing (`None`), cut short, without a header, with another tensor, and which of it."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    way = draw(st.integers(0, 6))
    if way == 0:
        return None, "missing"
    if way == 1:
        return data[: draw(st.integers(0, len(data) - 1))], "cut short"
    if way == 2:
        at = draw(st.integers(8, 8 + size - 1))
        return data[:at] + b"\xff" + data[at + 1 :], "no UTF-8 in the header"
    if way == 3:
        return struct.pack("<Q", draw(st.sampled_from([0, 1, size - 1, 2**31, 2**63]))) + data[8:], "header's size"
    if way == 4:
        junk = [b"", b"\0" * 100, b"PK\x03\x04" + data[4:], json.dumps(header).encode()]
        return draw(st.sampled_from(junk)), "another format"
    key = draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
    if way == 5:
        header[key + ".nosuch"] = header.pop(key)
    else:
        shape = header[key]["shape"]
        header[key]["shape"] = [shape[0] // 2, 2, *shape[1:]] if shape[0] % 2 == 0 else [1, *shape]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest, f"{key} has another {('name', 'shape')[way - 5]}"


# Checkpoints

MANIFEST, STATE = "checkpoint.json", "trainer_state.json"
WRONG_STATE: dict[str, list[Any]] = {
    "global_step": ["one", -1, None, 1.5, [1], True, DELETE],
    "max_steps": ["x", None, DELETE],
    "log_history": [3, None, {"a": 1}, DELETE],
    "stateful_callbacks": [3, [1], DELETE],
}
LOADED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@st.composite
def bad_checkpoints(draw: st.DrawFn, runs: Folders) -> Bad:
    """A damaged checkpoint of one of the stages, in its seal, sealed again, or without a seal."""
    stage = draw(st.sampled_from(list(runs)))
    files = dict(runs[stage])
    known = json.loads(files[MANIFEST])
    name = draw(st.sampled_from(sorted(files)))
    way, what = draw(st.integers(0, 4)), ""
    if way == 0 or name == MANIFEST and way < 3:
        files[MANIFEST] = draw(st.one_of(BAD_JSON, st.integers(0, 99).map(lambda n: runs[stage][MANIFEST][:n])))
        name = MANIFEST
    elif way == 1:
        del files[name]
    elif way == 2:
        at = draw(st.integers(0, len(files[name]) - 1))
        cut = draw(st.booleans())
        flipped = bytes([files[name][at] ^ 1 << draw(st.integers(0, 7))])
        files[name] = files[name][:at] if cut else files[name][:at] + flipped + files[name][at + 1 :]
    else:
        weights = [n for n in files if n.endswith(".safetensors") and "/" not in n]
        name = draw(st.sampled_from([STATE, *LOADED, *weights]))
        files[name], what = _bad_part(draw, name, files[name])
        if way == 3:
            del files[MANIFEST]
        else:
            known["files"][name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
            files[MANIFEST] = json.dumps(known).encode()
        words = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler", "rng_state.pth": "random states"}
        name = (name, "HERE/checkpoint-1: ") if name.endswith(".safetensors") else words.get(name, name)
    flags, names = {"--resume_from_checkpoint": "HERE/checkpoint-1"}, ["HERE/checkpoint-1", name]
    files = {f"checkpoint-1/{n}": text for n, text in files.items()}
    return Bad(stage, flags, files, names, f"way {way}, {name}: {what}")


def _bad_part(draw: st.DrawFn, name: str, data: bytes) -> tuple[bytes, str]:
    if name in LOADED:
        junk = [b"", b"text", b"PK\x03\x04", pickle.dumps({"a": 1}), b"\x80\x04."]
        cut = draw(st.integers(0, len(data) - 30))
        return draw(st.sampled_from([data[:cut], data[: cut // 2], *junk])), "cut short or junk"
    if name != STATE:
        bad, what = bad_weights(draw, data)
        return (data[: len(data) // 2], "half") if bad is None else (bad, what)
    if draw(st.booleans()):
        return draw(BAD_JSON), "no JSON object"
    key = draw(st.sampled_from(list(WRONG_STATE)))
    value = draw(st.sampled_from(WRONG_STATE[key]))
    return json.dumps(changed(json.loads(data), {key: value})).encode(), f"{key}={value!r}"

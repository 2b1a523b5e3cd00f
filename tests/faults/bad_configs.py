"""Settings, and YAML files of settings, that cannot be."""

from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

from .bad_inputs import Bad

NOT_FINITE = st.sampled_from([float("nan"), float("inf"), -float("inf")])
BELOW_0 = st.one_of(NOT_FINITE, st.floats(-1e6, -1e-9), st.integers(-100, -1))
NO_SHARE = st.one_of(BELOW_0, st.floats(1.0, 1e6, exclude_min=True), st.integers(2, 9))
AT_MOST_0 = st.one_of(BELOW_0, st.sampled_from([0, 0.0]))
NO_COUNT = st.one_of(AT_MOST_0, st.floats(0.001, 99).filter(lambda x: x != int(x)))
ALL, PPO = ("sft", "reward", "ppo_ptx"), ("ppo_ptx",)
# Fields of numbers: the recipes that have them, and what they cannot be
NUMBERS_OF: dict[str, tuple[tuple[str, ...], st.SearchStrategy]] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"), (ALL, BELOW_0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (ALL, st.one_of(NO_SHARE, st.just(1.0)))),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps"), (ALL, AT_MOST_0)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (ALL, NO_COUNT)),
    **dict.fromkeys(("gradient_accumulation_steps", "dataset_num_proc"), (("sft", "reward"), NO_COUNT)),
    "max_steps": (ALL, st.one_of(st.integers(-99, -2), st.sampled_from([0, 1.5]), NOT_FINITE)),
    "max_grad_norm": (ALL, st.sampled_from([float("nan"), -float("inf"), -1, -0.5])),
    "seed": (ALL, st.sampled_from([-1, 2**32, 10**30, 1.5, float("nan")])),
    "dataloader_num_workers": (ALL, st.sampled_from([-1, 0.5, float("inf")])),
    "label_smoothing_factor": (("sft", "reward"), st.one_of(NO_SHARE, st.just(1))),
    "max_length": (("sft", "reward"), NO_COUNT),
    **dict.fromkeys(("residual_dropout", "pretraining_fraction"), (("sft",), st.one_of(NO_SHARE, st.just(1.0)))),
    "rm_score_max_new_tokens": (("sft",), NO_COUNT),
    "center_rewards_coefficient": (("reward",), BELOW_0),
    **dict.fromkeys(("gamma", "lam", "ema_decay"), (PPO, NO_SHARE)),
    **dict.fromkeys(("beta", "vf_coef", "ptx_coef", "value_learning_rate"), (PPO, BELOW_0)),
    **dict.fromkeys(("temperature", "kl_target"), (PPO, AT_MOST_0)),
    **dict.fromkeys(("cliprange_value", "epsilon"), (PPO, st.sampled_from([float("nan"), 0, 0.0, -0.2, -3]))),
    **dict.fromkeys(("ptx_ratio", "kl_horizon", "max_prompt_length", "max_completion_length"), (PPO, NO_COUNT)),
    **dict.fromkeys(("num_iterations", "num_generations", "generation_micro_batch_size"), (PPO, NO_COUNT)),
    **dict.fromkeys(("steps_per_generation", "ptx_max_length"), (PPO, NO_COUNT)),
    "warmup_updates": (PPO, st.sampled_from([-1, 0.5, float("nan"), float("inf")])),
    "missing_eos_score": (PPO, NOT_FINITE),
    "eval_fraction": (ALL, st.one_of(NO_SHARE, st.just(1), st.just(0.999))),
    **dict.fromkeys(("lora_r", "lora_alpha"), (ALL, NO_COUNT)),
    "lora_dropout": (ALL, st.one_of(NO_SHARE, st.just(1))),
}
NO_NUMBER = st.sampled_from(["fast", "1e", "0x1g", "", "1,5", [1], [], {"a": 1}, True, None, [[]]])
CHOICES_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("eval_strategy", "logging_strategy", "save_strategy", "lr_scheduler_type", "optim"), ALL),
    **dict.fromkeys(("dtype", "bnb_4bit_quant_type", "attn_implementation"), ALL),
    **dict.fromkeys(("packing_strategy", "loss_type", "truncation_mode"), ("sft",)),
    "prefix_sharing": ("reward",),
    "lora_task_type": ALL,
}
FLAGS_OF = (
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "use_peft",
    "load_in_4bit",
    "trust_remote_code",
    "conversational",
)
OBJECTS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model_init_kwargs", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs"), ALL),
    **dict.fromkeys(("generation_kwargs", "chat_template_kwargs"), PPO),
    "dataset_kwargs": ("sft",),
}
TEXTS_OF = ("dataset", "model_name_or_path", "output_dir", "model_revision", "run_name")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
EVALUATED |= {"eval_fraction": 0.5}
# Settings that contradict each other or the rows, and what is named
CONTRADICTIONS: list[tuple[tuple[str, ...], dict[str, Any], str | tuple[str, ...]]] = [
    (ALL, {"bf16": True, "fp16": True}, "bf16"),
    (ALL, {"load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit"),
    (ALL, {"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy"),
    (ALL, {"eval_strategy": "epoch"}, "eval_strategy"),
    (ALL, {"load_best_model_at_end": True, "save_strategy": "steps"}, "load_best_model_at_end"),
    (ALL, {"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    (ALL, {"logging_steps": 2.5}, "logging_steps"),
    (ALL, {"save_steps": 7.5}, "save_steps"),
    (ALL, {"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint"),
    (ALL, {"resume_from_checkpoint": True}, "resume_from_checkpoint"),
    (ALL, {"use_peft": True, "lora_target_modules": "nosuch"}, ("nosuch", "target_modules")),
    (ALL, {"use_peft": True, "lora_target_modules": ["nosuch", "nor_this"]}, ("nosuch", "target_modules")),
    (ALL, {"use_peft": True, "lora_modules_to_save": ["nosuch"]}, "modules_to_save: 'nosuch'"),
    (ALL, {"use_peft": True, "lora_target_parameters": ["nosuch"]}, "target_parameters: 'nosuch'"),
    (ALL, {"use_peft": True, "lora_task_type": "SEQ_2_SEQ_LM"}, "lora_task_type"),
    (ALL, {"accelerator_config": {"nosuch": 1}}, "accelerator_config"),
    (ALL, {"gradient_checkpointing_kwargs": {"nosuch": 1}}, "gradient_checkpointing_kwargs"),
    (ALL, {"torch_compile_backend": "nosuch"}, "torch_compile_backend"),
    (ALL, {"torch_compile_mode": "nosuch"}, "torch_compile_mode"),
    (ALL, {"per_device_train_batch_size": 10**30}, "per_device_train_batch_size"),
    (ALL, {"output_dir": ""}, "output_dir"),
    (ALL, {"train_sampling_strategy": "length"}, "train_sampling_strategy"),
    (("sft", "reward"), {"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "dataloader_drop_last"),
    (ALL, {**EVALUATED, "metric_for_best_model": "nosuch"}, "metric_for_best_model"),
    (PPO, {**EVALUATED, "load_best_model_at_end": True}, "metric_for_best_model='loss'"),
    (ALL, {"model_init_kwargs": {"nosuch": 1}}, "nosuch"),
    (ALL, {"lr_scheduler_kwargs": {"nosuch": 1}}, "nosuch"),
    (ALL, {"lr_scheduler_kwargs": {1: 2, "nosuch": 1}}, "lr_scheduler_kwargs"),
    (("sft", "reward"), {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0.1}}, "min_lr"),
    (ALL, {"model_init_kwargs": {"dtype": "float13"}}, "dtype"),
    (ALL, {"model_init_kwargs": '{"dtype": '}, "model_init_kwargs"),
    (ALL, {"model_name_or_path": "nowhere"}, "nowhere"),
    (ALL, {"model_name_or_path": "/"}, "config.json"),
    (ALL, {"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
    (ALL, {"dataset": "no/such-dataset"}, "no/such-dataset"),
    (ALL, {"eval_dataset": "nowhere.csv"}, "nowhere.csv"),
    (ALL, {"output_dir": "/dev/null/out"}, "/dev/null/out"),
    (("sft",), {"metric_for_best_model": "eval_rm_score"}, "eval_rm_score"),
    (("sft",), {"reward_model": "nowhere"}, "reward_model"),
    (("sft",), {"eos_token": "<nope>"}, "<nope>"),
    (("sft",), {"assistant_only_loss": True}, "assistant_only_loss"),
    (("sft",), {"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau"),
    (("sft",), {"max_length": 1}, "max_length"),
    (("reward",), {"max_length": 2}, "max_length=2"),
    (PPO, {"kl_target": 1.0, "beta": 0.0}, "kl_target"),
    (PPO, {"steps_per_generation": 3}, "steps_per_generation"),
    (PPO, {"steps_per_generation": 4, "generation_batch_size": 4}, "generation_batch_size"),
    (PPO, {"steps_per_generation": 400}, "less than one batch"),
    (PPO, {"generation_batch_size": 7}, ("generation_batch_size", "steps_per_generation")),
    (PPO, {"num_generations": 3}, "num_generations"),
    (PPO, {"epsilon_high": 0.3}, "epsilon_high"),
    (PPO, {"sync_ref_model": True}, "sync_ref_model"),
    (PPO, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    (PPO, {"lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
    (PPO, {"auto_find_batch_size": True}, "auto_find_batch_size"),
    (PPO, {"top_p": 0.9}, "top_p"),
    (PPO, {"top_k": 50}, "top_k"),
    (PPO, {"min_p": 0.1}, "min_p"),
    (PPO, {"repetition_penalty": 1.1}, "repetition_penalty"),
    (PPO, {"generation_kwargs": {"num_beams": 4}}, "num_beams"),
    (PPO, {"generation_kwargs": {"temperature": 0.5}}, "temperature"),
    (PPO, {"generation_kwargs": {"max_new_tokens": 5}}, "max_completion_length"),
    (PPO, {"num_completions_to_print": -1}, "num_completions_to_print"),
    (PPO, {"generation_kwargs": {"do_sample": False}}, "do_sample"),
    (PPO, {"reward_weights": [1.0, 2.0]}, "reward_weights"),
    (PPO, {"reward_weights": [float("nan")]}, "reward_weights"),
    (PPO, {"reward_weights": [0.0]}, "reward_weights"),
    (PPO, {"reward_clip_range": [1.0, -1.0]}, "reward_clip_range"),
    (ALL, {"warmup_steps": 1e300}, "warmup_steps"),
    (ALL, {"learning_rate": 1e300}, "learning_rate"),
    (ALL, {"weight_decay": -1e300}, "weight_decay"),
    (PPO, {"beta": 1e300}, "beta"),
    (PPO, {"missing_eos_score": -1e300}, "missing_eos_score"),
    (PPO, {"temperature": 1e-300}, "temperature"),
    (PPO, {"reward_weights": ["x"]}, "reward_weights"),
    (("sft", "reward"), {"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    (("sft", "reward"), {"activation_offloading": True}, "activation_offloading"),
    (("sft", "reward"), {"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs"),
    (
        ("sft", "reward"),
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
        "inverse_sqrt",
    ),
    (
        ("sft", "reward"),
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}},
        "below 0",
    ),
    (
        ("sft", "reward"),
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}},
        "lr_scheduler_kwargs",
    ),
    (PPO, {"max_prompt_length": 2}, "2 tokens"),
    (PPO, {"reward_model": "nowhere"}, "nowhere"),
    (PPO, {"reward_model": "/"}, "/"),
]
NO_YAML = [
    *(
        b"",
        b"null",
        b"3",
        b"text",
        b"- learning_rate",
        b"a: [1",
        b"a: b: c",
        b"\tx: 1",
        b"a: {",
        b"'open",
        b"&a *b",
        b"%",
    ),
    *(b"\xff\xfe\x00", b"\x00\x01", b"caf\xe9: 1", b"a: !!python/object/apply:os.getcwd []", b"1: 2", b"null: 1"),
    *(b"? [a]\n: 1", b"{[1]: 2}", b"[" * 3000, b"a: 1\n---\nb: 2", b"true: 1", b"env: 3", b"@", b"`x"),
    *(b"seed: 1\nseed: 2", b"model_init_kwargs:\n  a: 1\n  a: 2"),
]


@st.composite
def bad_configs(draw: st.DrawFn) -> Bad:
    way = draw(st.integers(0, 10))
    if way <= 4:
        name = draw(st.sampled_from(list(NUMBERS_OF)))
        stages, values = NUMBERS_OF[name]
        return _of_setting(draw, stages, name, draw(st.one_of(values, values, NO_NUMBER.filter(_is_wrong(name)))))
    if way == 5:
        name = draw(st.sampled_from(list(CHOICES_OF)))
        word = draw(st.sampled_from(["nosuch", "", "float13", "Steps ", "8", 3, [1], False, {"a": 1}]))
        return _of_setting(draw, CHOICES_OF[name], name, word)
    if way == 6:
        name = draw(st.sampled_from(list(OBJECTS_OF)))
        return _of_setting(
            draw, OBJECTS_OF[name], name, draw(st.sampled_from(["x", "{", "[1]", '{"a"}', "{1: 2}", 3]))
        )
    if way == 7:
        value = draw(st.sampled_from(["maybe", "2", "", 3, [True], {"a": 1}, 1.5]))
        return _of_setting(draw, ALL, draw(st.sampled_from(FLAGS_OF)), value)
    if way == 8:
        name, value = draw(st.sampled_from(TEXTS_OF)), draw(st.sampled_from([3, [1], {"a": 1}, True, 1.5]))
        return Bad(
            draw(st.sampled_from(ALL)), {"--config": "HERE/x.yaml"}, _yaml({name: value}), ["HERE/x.yaml", name]
        )
    if way == 9:
        key = draw(
            st.sampled_from(["learning_rte", "datset", "Seed", "lr", "output-dirs", "help", "config", "_n_gpu"])
        )
        in_file = draw(st.booleans())
        flags, files = ({"--config": "HERE/x.yaml"}, _yaml({key: 1})) if in_file else ({f"--{key}x": "1"}, {})
        return Bad(draw(st.sampled_from(ALL)), flags, files, ["unknown key", key])
    content = draw(st.one_of(st.sampled_from(NO_YAML), st.binary(max_size=9).map(lambda junk: b"\xff" + junk)))
    return Bad(draw(st.sampled_from(ALL)), {"--config": "HERE/x.yaml"}, {"x.yaml": content}, ["HERE/x.yaml"])


def _is_wrong(name: str) -> Callable[[Any], bool]:
    """`None` is a setting where it is the default, or means without a limit."""
    nothing = ("max_length", "dataset_num_proc", "center_rewards_coefficient", "kl_target", "max_prompt_length")
    nothing += ("generation_micro_batch_size", "steps_per_generation", "ptx_max_length", "missing_eos_score")
    nothing += ("num_generations", "max_completion_length")  # by TRL's types, but not here
    return lambda value: value is not None or name not in nothing


def _yaml(values: dict[str, Any]) -> dict[str, bytes | None]:
    return {"x.yaml": yaml.safe_dump(values).encode()}


def _of_setting(draw: st.DrawFn, stages: tuple[str, ...], name: str, value: Any) -> Bad:
    """As a flag, which is text, or in a YAML file."""
    stage = draw(st.sampled_from(stages))
    peft = {"--use_peft": "true"} if name.startswith("lora_") else {}
    if isinstance(value, int | float | str) and not isinstance(value, bool) and draw(st.booleans()):
        text = str(value) if value != "" else "''"
        return Bad(stage, {**peft, f"--{name}": f"{text}"}, {}, [name])
    return Bad(stage, {**peft, "--config": "HERE/x.yaml"}, _yaml({name: value}), [name])


CONFIGS = bad_configs()
CONTRARY = [
    Bad(stage, {"--config": "HERE/x.yaml"}, _yaml(values), [named])
    for stages, values, named in CONTRADICTIONS
    for stage in stages
]

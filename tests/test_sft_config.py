"""sft_config.py: the paper's defaults, ranges, and every device."""

import pytest
import torch
from transformers import SchedulerType
from trl import TrlParser

from instructgpt_trl.data import InputError
from instructgpt_trl.sft_config import SFTConfig


def test_defaults_are_the_papers(tmp_path):
    config = SFTConfig(str(tmp_path))
    assert (config.learning_rate, config.num_train_epochs) == (9.65e-6, 16)
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)
    assert config.lr_scheduler_type == SchedulerType.COSINE_WITH_MIN_LR
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert config.warmup_steps == 0
    assert (config.residual_dropout, config.pretraining_fraction) == (0.2, 0.1)


@pytest.mark.parametrize("name", ["linear", "constant", "cosine"])
def test_another_schedule_gets_no_arguments(tmp_path, name):
    assert not SFTConfig(str(tmp_path), lr_scheduler_type=name).lr_scheduler_kwargs


def test_given_schedule_arguments_are_kept(tmp_path):
    assert SFTConfig(str(tmp_path), lr_scheduler_kwargs={"min_lr": 1e-7}).lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert SFTConfig(str(tmp_path), lr_scheduler_kwargs='{"min_lr": 1e-7}').lr_scheduler_kwargs == {"min_lr": 1e-7}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual_dropout", -0.1),
        ("residual_dropout", 1.0),
        ("residual_dropout", float("nan")),
        ("pretraining_fraction", 1.0),
        ("pretraining_fraction", -0.1),
        ("rm_score_max_new_tokens", 0),
    ],
)
def test_out_of_range_is_refused(tmp_path, field, value):
    with pytest.raises(InputError, match=f"{field}={value}: expected"):
        SFTConfig(str(tmp_path), **{field: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_pitfall_12_no_flags_without_a_gpu(tmp_path):
    config = SFTConfig(str(tmp_path))
    assert (config.bf16, config.fp16) == (False, False)


def test_flags_and_unknown_keys_on_the_command_line(tmp_path):
    parser = TrlParser([SFTConfig])
    args = ["--output_dir", str(tmp_path), "--residual_dropout", "0.3", "--lr_scheduler_type", "linear"]
    (config,) = parser.parse_args_and_config(args=args)
    assert (config.residual_dropout, config.lr_scheduler_type) == (0.3, SchedulerType.LINEAR)
    assert "10%" in parser.format_help()
    with pytest.raises(ValueError, match="residual_droput"):
        parser.parse_args_and_config(args=[*args, "--residual_droput", "0.3"])

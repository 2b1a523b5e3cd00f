"""InstructGPT (Ouyang et al. 2022) as thin subclasses of TRL's trainers."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.reward_model import RewardModel
    from .ppo_config import PPOConfig
    from .ppo_trainer import PPOTrainer
    from .reward_config import RewardConfig
    from .reward_trainer import RewardTrainer
    from .sft_config import SFTConfig
    from .sft_trainer import SFTTrainer

__version__ = "0.1.0"

# Loaded when first used: a script that only reads rows does not wait for the trainers
_HOMES = {
    "PPOConfig": "ppo_config",
    "PPOTrainer": "ppo_trainer",
    "RewardConfig": "reward_config",
    "RewardModel": "models.reward_model",
    "RewardTrainer": "reward_trainer",
    "SFTConfig": "sft_config",
    "SFTTrainer": "sft_trainer",
}

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

"""What rewards a completion: reward models and plain functions, all of them as TRL's reward functions."""

import os
from collections.abc import Callable
from typing import Any

import torch

from .._trl import get_callable_name, is_async_callable
from ..data.episodes import pad_episodes
from .reward_model import RewardModel
from .roles import Role


def all_rewards(reward_funcs: Any, reward_model: Any) -> list:
    """Whatever rewards, in the order of `reward_weights`: that of `reward_model`, then that of `reward_funcs`."""
    listed = [x if isinstance(x, list) else [x] for x in (reward_model, reward_funcs) if x is not None]
    return [_as_string(reward) for group in listed for reward in group]


def is_model(reward: Any) -> bool:
    """Whether a reward is a reward model: a folder, an object or a network."""
    return isinstance(reward, str | RewardModel | torch.nn.Module)


def _as_string(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


class ModelReward:
    """
    A reward model as one of TRL's reward functions. It reads token ids, never text.

    Args:
        trainer: the `PPOTrainer`, which runs roles in its micro-batches and stops at what is not finite.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.__name__ = "reward_model"  # what logs call it
        self.role: Role | None = None  # set once the roles are built

    def __call__(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], **kwargs) -> list[float]:
        episodes = pad_episodes(prompt_ids, completion_ids, self.trainer.processing_class.pad_token_id)
        episodes = {name: tensor.to(self.trainer.accelerator.device) for name, tensor in episodes.items()}
        scores = self.trainer.run_role(self.role, "scores", episodes)[0][:, 0]
        self.trainer.stop_unless_finite(scores, f"a score of '{self.__name__}'")
        return scores.tolist()


def finite_reward(function: Callable, trainer: Any) -> Callable:
    """A reward function that stops the run at NaN or infinity, where TRL takes NaN, like `None`, as no score."""

    def checked(scores: Any) -> Any:
        given = [score for score in scores if score is not None]
        trainer.stop_unless_finite(torch.tensor(given, dtype=torch.float), f"a score of '{wrapped.__name__}'")
        return scores

    if is_async_callable(function):

        async def wrapped(**kwargs):
            return checked(await function(**kwargs))
    else:

        def wrapped(**kwargs):
            return checked(function(**kwargs))

    wrapped.__name__ = get_callable_name(function)
    return wrapped

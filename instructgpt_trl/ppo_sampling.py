"""From prompts to sampled completions, by TRL's own generation, with transformers or vLLM."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from ._trl import cache_with_room, sampled_by_cdf
from .data import InputError, encode_prompt
from .data.encoding import turn_end
from .data.episodes import Episodes, pad_episodes
from .models.guards import RunStopped
from .models.loading import restored
from .models.lora import merged_lora, merged_parameters

_REWARD_ARGUMENTS = ("prompts", "completions")  # TRL's own; columns of these names cannot be passed to functions


class PPOSampling:
    """The part of [`PPOTrainer`] that samples. Overrides: `_tokenize_prompts`, `_generate_single_turn`."""

    def _stop_at_turn_end(self) -> None:
        """Answers to conversations end where those of the reward model's training end, whatever the model's config."""
        if isinstance(next(iter(self.train_dataset), {"prompt": ""})["prompt"], str):
            return
        end = turn_end(self._tokenizer, **self.chat_template_kwargs)
        if end is not None and end not in self.eos_token_ids:
            self.eos_token_ids = [*self.eos_token_ids, end]
            if not self.use_vllm:
                self.generation_config.eos_token_id = self.eos_token_ids

    def _set_up_vllm(self) -> None:
        """
        It ends completions where the policy's end, whatever it reads from the model's files, and gets an adapter in
        copies: TRL merges it into the base and subtracts it again, by whose rounding all that stands there would move.
        """
        vllm, policy = self.vllm_generation, self.roles.policy
        vllm.generation_kwargs = {"stop_token_ids": self.eos_token_ids, **vllm.generation_kwargs}
        if policy.adapter is not None:
            own = {id(parameter) for parameter in policy.parameters().values()}
            ends = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
            if any(id(parameter) in own for module in ends for parameter in module.parameters()):
                raise InputError(
                    "use_vllm: the adapter trains embeddings or the LM head, which vLLM ties to each other where the "
                    "base does, and PEFT does not; leave them out of target_modules, modules_to_save and "
                    "trainable_token_indices"
                )
            vllm._iter_named_params = partial(merged_parameters, policy.network, policy.adapter)

    def _sample(self, inputs: list[dict[str, Any]]) -> tuple[Episodes, list[dict[str, Any]]]:
        prompt_ids, completion_ids, completions = self._generate([row["prompt"] for row in inputs])
        rows = []
        for row, *sampled in zip(inputs, prompt_ids, completion_ids, completions, strict=True):
            own = {name: value for name, value in row.items() if name not in _REWARD_ARGUMENTS}
            rows.append(own | dict(zip(("prompt_ids", "completion_ids", "completion"), sampled, strict=True)))
        episodes = pad_episodes(prompt_ids, completion_ids, self._tokenizer.pad_token_id)
        episodes["ended"] = torch.tensor([ids[-1] in self.eos_token_ids for ids in completion_ids])
        if self.mask_truncated_completions:
            episodes["mask"] = episodes["mask"] & episodes["ended"][:, None]
        return {name: tensor.to(self.accelerator.device) for name, tensor in episodes.items()}, rows

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        ids = [encode_prompt(self._tokenizer, prompt, **self.chat_template_kwargs) for prompt in prompts]
        return ids, None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields) -> list[list[int]]:
        # `generate` fills what the trainer's config leaves open from the model's own, which may cut the distribution
        policy = self.roles.policy
        with policy.active(), sampled_by_cdf(), restored(policy.model, "generation_config"), ExitStack() as inside:
            if self._spends_memory and not self.use_vllm:
                # A decoding step is many small products, twice to three times as many with the adapter beside
                inside.enter_context(merged_lora(policy.network, policy.adapter))
                inside.enter_context(cache_with_room())
            policy.model.generation_config = GenerationConfig()
            sample = super()._generate_single_turn
            completion_ids = self._limits["generate"].run(
                lambda rows: [
                    ids
                    for start in range(0, len(prompt_ids), rows)
                    for ids in sample(prompt_ids[start : start + rows], images, multimodal_fields)
                ],
                there=len(prompt_ids),
            )
        if any(len(ids) == 0 for ids in completion_ids):
            raise RunStopped(f"step {self.state.global_step}: an empty completion; check the generation settings")
        if self.model.training and all(ids[0] in self.eos_token_ids for ids in completion_ids):
            raise RunStopped(
                f"step {self.state.global_step}: every completion is EOS alone: the policy has collapsed or the "
                f"prompts already end a turn; look at the prompts, lower learning_rate or raise beta"
            )
        return completion_ids

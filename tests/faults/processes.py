"""
The three stages for a few steps on the rows, texts and completions of one world, in as many processes as this is
started in: what one minibatch of four gives in one process, two of two give in two.

    accelerate launch --multi_gpu --num_processes 2 tests/faults/processes.py WORLD OUTPUT

WORLD is made where it is not there. Writes of each stage, LoRA and full, the gradients before each step, the weights
at the end and the log.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from stages import STAGES, World  # which knows the way to tests/
from transformers import TrainerCallback
from trl import RLOOTrainer

from ppo_helpers import stored_completion  # isort: skip

STEPS, MINIBATCH = 3, 4


class Gradients(TrainerCallback):
    """As they are when the optimizer gets them, and the weights at the end."""

    def __init__(self, trainer):
        self.trainer, self.found = trainer, {}

    def _parameters(self):
        if hasattr(self.trainer, "roles"):
            own = {"policy": self.trainer._policy_parameters, "value": self.trainer._value_parameters}
            return [(f"{role}.{name}", p) for role, of in own.items() for name, p in of.items()]
        return [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self._parameters():
            self.found[f"{state.global_step}.{name}"] = parameter.grad.detach().clone()

    def on_train_end(self, args, state, control, **kwargs):
        for name, parameter in self._parameters():
            self.found[f"end.{name}"] = parameter.detach().clone()


def main(folder: Path, output: Path) -> None:
    world, processes = World(folder), PartialState(cpu=True).num_processes
    RLOOTrainer._generate_single_turn = lambda self, ids, *_: [stored_completion(list(one)) for one in ids]
    for stage, kind in STAGES:
        own = output / f"{stage}-{kind}"
        # With Adam's own epsilon a weight of no gradient but rounding moves as far as others
        settings = dict(use_cpu=True, max_steps=STEPS, save_strategy="no", max_grad_norm=1e9, adam_epsilon=1e-3)
        settings |= dict(per_device_train_batch_size=MINIBATCH // processes, learning_rate=1e-3, eval_steps=STEPS)
        settings |= dict(per_device_eval_batch_size=MINIBATCH // processes)  # whose means Trainer takes a mean of
        if stage == "sft":  # each process drops by its own generator
            settings |= dict(residual_dropout=0.0, load_best_model_at_end=False)
        if stage == "ppo":  # a rollout is one minibatch, of the same rows then
            settings |= dict(gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1)
            settings |= dict(value_learning_rate=1e-3, warmup_updates=0)
        trainer = world.trainer(stage, kind, own, **settings)
        gradients = Gradients(trainer)
        trainer.add_callback(gradients)
        trainer.train()
        trainer.save_model()
        if trainer.is_world_process_zero():
            save_file(gradients.found, own / "gradients.safetensors")
            (own / "log.json").write_text(json.dumps(trainer.state.log_history))
    (output / f"resumed-{PartialState().process_index}.json").write_text(json.dumps(resumed(world, output, processes)))


def resumed(world: World, output: Path, processes: int) -> bool:
    """Whether runs that go on inside a rollout, in the first epoch or the second, end as one that did not stop."""
    weights = []
    for step in (None, 1, 7):
        settings = dict(use_cpu=True, max_steps=10, gradient_accumulation_steps=1, steps_per_generation=2)
        settings |= dict(per_device_train_batch_size=MINIBATCH // processes, save_total_limit=None)
        trainer = world.trainer("ppo", "lora", output / ("resumed" if step else "straight"), **settings)
        trainer.train(resume_from_checkpoint=step and str(output / "straight" / f"checkpoint-{step}"))
        weights.append({name: parameter.detach().clone() for name, parameter in trainer._trained().items()})
    straight, *others = weights
    return all(torch.equal(tensor, other[name]) for other in others for name, tensor in straight.items())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""One minibatch of PPO-ptx: the gradients of policy, value model and pretraining, and what is logged of them."""

import time
from typing import Any

import torch

from .data.episodes import Episodes, take_rows
from .data.pretraining import as_episodes
from .functional import policy_loss, value_loss
from .models.guards import first_not_finite
from .ppo_checks import check_first_ratio
from .processes import sum_over_all

_GRADIENTS = {
    "grad_norm/policy": "the policy's",
    "grad_norm/ptx": "the pretraining",
    "grad_norm/value": "the value model's",
}


class PPOUpdate:
    """The part of [`PPOTrainer`] that learns [P Eq. 2]. Overrides: `training_step`, `_clip_grad_norm`."""

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """
        One micro-batch: the policy's backward pass, the value model's, and behind the last one of a minibatch the
        pretraining passes, all into the same gradient buffers. Losses are means over all tokens of the minibatch.
        """
        started = time.perf_counter()
        model.train()
        self.roles.value.network.train()
        accumulation = self.args.gradient_accumulation_steps
        self._prepare_inputs(inputs)
        if self._step % accumulation == 0:
            tokens = self._episodes["mask"][self._rows_of(self._step % self.args.steps_per_generation, accumulation)]
            self._minibatch_tokens = self.accelerator.reduce(tokens.sum(), "sum").clamp(min=1)
        loss = self._limits["train"].run(self._accumulate)
        self.stop_unless_finite(loss, f"the loss of micro-batch {self._step % accumulation}")
        self._step += 1
        last = self._step % accumulation == 0
        if last:
            self._finish_minibatch(loss)
        self._current_train_step_time += time.perf_counter() - started
        if last:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss * self.accelerator.num_processes  # Trainer logs the mean over processes, and each has its share

    def _finish_minibatch(self, loss: torch.Tensor) -> None:
        """Gradients and metrics of all processes together; stop if they are not finite."""
        self._add_up_processes(loss)
        if self._ptx_stream is None:
            self._sums["grad_norm/policy"] = self._norm(self._policy_parameters)
        else:
            self._sums["grad_norm/policy"] = self._norm(self._policy_part)
            # A difference at a time: those of all weights are as large as the model
            added = [
                _norm_of_difference(p.grad, self._policy_part[name]) for name, p in self._policy_parameters.items()
            ]
            self._sums["grad_norm/ptx"] = self._norm(dict(enumerate(added)))
            self._policy_part = {}
        self._sums["grad_norm/value"] = self._norm(self._value_parameters)
        if self.accelerator.scaler is None:  # a gradient scaler skips steps of infinite gradients by itself
            for name, whose in _GRADIENTS.items():
                norm = torch.tensor(self._sums.get(name, 0.0))
                if not norm.isfinite():
                    trained = self._value_parameters if name.endswith("value") else self._policy_parameters
                    first = first_not_finite((key, parameter.grad) for key, parameter in trained.items())
                    self.stop_unless_finite(norm, f"{whose} gradient of {first or 'all together'}")
        for name, value in self._sums.items():
            self._metrics["train"][name].append(value)
        self._sums.clear()

    def _add_up_processes(self, loss: torch.Tensor) -> None:
        if self.accelerator.num_processes == 1:
            return
        trained = self._trained().values()
        for parameter in trained:  # of experts that nobody asked in one process, say
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        part = [grad for grad in self._policy_part.values() if grad is not None]
        sums = torch.tensor([loss.item(), *self._sums.values()], device=loss.device)
        sum_over_all(self.accelerator, [*(parameter.grad for parameter in trained), *part, sums])
        whole, *found = sums.tolist()
        self._sums.update(zip(self._sums, found, strict=True))
        self.stop_unless_finite(torch.tensor(whole), "the loss")

    def _accumulate(self, rows: int) -> torch.Tensor:
        """
        Add the gradient of this micro-batch, `rows` at a time; of the whole minibatch so far where it was begun with
        more rows, which did not fit. The gradient is the same, whatever `rows` is.
        """
        accumulation = self.args.gradient_accumulation_steps
        done = self._step % accumulation
        start = self._step % self.args.steps_per_generation - done
        todo = [done]
        if rows < self.args.per_device_train_batch_size:
            self.roles.value.kept = None  # as above
        if done == 0 or rows != self._begun:
            self._begun, todo = rows, list(range(done + 1))
            self._sums.clear()
            for parameter in self._trained().values():
                parameter.grad = None
        tokens = self._minibatch_tokens
        for micro_batch in todo:
            loss = torch.zeros((), device=tokens.device)
            for some in self._rows_of(start + micro_batch, 1).split(rows):
                batch = take_rows(self._episodes, some)
                share = batch["mask"].sum() / tokens
                loss = loss + self._policy_backward(batch, share) + self._value_backward(batch, share)
        if done == accumulation - 1 and self._ptx_stream is not None:
            count = self.args.per_device_train_batch_size * accumulation * self.args.ptx_ratio
            loss = loss + self._ptx_backward(count, rows)
        return loss

    def _policy_backward(self, batch: Episodes, share: torch.Tensor) -> torch.Tensor:
        old, mask, epsilon = batch["logprobs"], batch["mask"], self.args.epsilon
        with self.roles.policy.active():
            logprobs, _ = self.roles.policy.take_kept(batch) or self.roles.policy.logprobs(batch)
            loss = policy_loss(logprobs, old, batch["advantages"], mask, epsilon) * share
            self.accelerator.backward(loss)
        change = (logprobs.detach() - old)[mask]
        if self._is_at_start and self.args.disable_dropout:
            check_first_ratio(change)
        ratio, advantages = change.exp(), batch["advantages"][mask]
        clipped = torch.where(advantages > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
        self._add("loss/policy", loss)
        self._add("policy/approxkl", _mean(change**2 / 2) * share)
        self._add("policy/clipfrac", _mean(clipped.float()) * share)
        self._add("policy/ratio", _mean(ratio) * share)
        return loss.detach()

    def _value_backward(self, batch: Episodes, share: torch.Tensor) -> torch.Tensor:
        old, returns, mask, cliprange = batch["values"], batch["returns"], batch["mask"], self.args.cliprange_value
        with self.roles.value.active():
            (values,) = self.roles.value.take_kept(batch) or self.roles.value.values(batch)
            loss = value_loss(values, old, returns, mask, cliprange) * share
            self.accelerator.backward(self.args.vf_coef * loss)
        values = values.detach()
        clipped = old + (values - old).clamp(-cliprange, cliprange)
        used = ((clipped - returns) ** 2 > (values - returns) ** 2)[mask]
        self._add("loss/value", loss)
        self._add("value/clipfrac", _mean(used.float()) * share)
        return self.args.vf_coef * loss.detach()

    def _ptx_backward(self, count: int, size: int) -> torch.Tensor:
        """`ptx_coef` times the mean loss a token over `count` pretraining blocks a process, `size` at a time."""
        grads = {name: p.grad for name, p in self._policy_parameters.items()}
        self._policy_part = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
        in_all = count * self.accelerator.num_processes
        blocks = self._ptx_stream.take(self.state.global_step * in_all, in_all)
        tokens = sum(len(block) - 1 for block in blocks)
        blocks = blocks[self.accelerator.process_index * count :][:count]
        total = torch.zeros((), device=self.accelerator.device)
        with self.roles.policy.active():
            for start in range(0, count, size):
                batch = as_episodes(blocks[start : start + size])
                batch = {name: tensor.to(total.device) for name, tensor in batch.items()}
                logprobs, _ = self.roles.policy.logprobs(batch, self._ptx_model)
                loss = -torch.where(batch["mask"], logprobs, 0.0).sum() / tokens
                self.accelerator.backward(self.args.ptx_coef * loss)
                total += loss.detach()
        self._add("loss/ptx", total)
        return self.args.ptx_coef * total

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Clip policy and value model apart, so that a large value gradient does not shrink the policy's step."""
        self.accelerator.unscale_gradients()
        for parameters in (self._value_parameters, self._policy_parameters):
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.args.max_grad_norm)
        return norm

    def _rows_of(self, micro_batch: int, count: int) -> torch.Tensor:
        size = self.args.per_device_train_batch_size
        return self._order[micro_batch * size : (micro_batch + count) * size]

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] += value.detach().item()

    def _norm(self, tensors: dict[str, Any]) -> float:
        grads = [t.grad if isinstance(t, torch.nn.Parameter) else t for t in tensors.values()]
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        return torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item() / scale


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean() if x.numel() else x.new_zeros(())


def _norm_of_difference(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None else torch.linalg.vector_norm(a if b is None else a - b)

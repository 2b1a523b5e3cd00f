"""A policy as lm-evaluation-harness sees it."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from files import loading
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer


class LanguageModel(HFLM):
    """
    A causal language model, or a folder that a recipe wrote (full, or an adapter on its base).

    Args:
        path (`str`): Folder or hub id.
        batch_size (`int`): Sequences at a time.
        kwargs: Of `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`, `quantization_config` ...

    Attributes:
        per_token (`bool`): Log-likelihoods are averages over a continuation's tokens, by which the paper chooses
            [InstructGPT, Appendix D], and not sums.

    Raises:
        [`InputError`]: there is no such model.
    """

    def __init__(self, path: str, batch_size: int = 8, **kwargs: Any):
        kwargs = {"device_map": PartialState().default_device, "trust_remote_code": False, **kwargs}
        with loading(path):
            # An adapter's folder has one too
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        super().__init__(model.eval(), tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        self.path = path if not Path(path).exists() else str(Path(path).resolve())
        self.per_token = False

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        found = super()._loglikelihood_tokens(requests, **kwargs)
        if not self.per_token:
            return found
        return [(total / len(tokens), greedy) for (total, greedy), (*_, tokens) in zip(found, requests, strict=True)]

    def logprobs(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Log-probability of each completion behind its prompt, in nats; behind "" it begins the text."""
        pairs = zip(prompts, completions, strict=True)
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [total for total, _ in self.loglikelihood(requests)]

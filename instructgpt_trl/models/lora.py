"""LoRA in fewer passes through memory than PEFT's own, with the same result but for rounding."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .._trl import LoraVariant
from ..data import InputError

# Ways of starting an adapter that change the base's weights: peft/tuners/lora/layer.py, `update_layer`
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_start(config: PeftConfig | None) -> None:
    """Raise [`InputError`] if the base that an adapter stands on would be another for the adapters beside it."""
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise InputError(
            f"init_lora_weights={start!r} moves a part of the base's weights into the adapter, and others stand on "
            f"that base, the value model at least; use another, or merge the adapter into its base first"
        )


def check_named(network: nn.Module) -> None:
    """Raise [`InputError`] if an adapter is to train modules or parameters that are nowhere: PEFT passes over them."""
    for config in getattr(network, "peft_config", {}).values():
        model = network.get_base_model()
        modules = [name for name, _ in model.named_modules()]
        parameters = getattr(network.base_model, "targeted_parameter_names", [])
        saved = {*(getattr(config, "modules_to_save", None) or ())} - {"classifier", "score"}  # which PEFT adds
        asked = {
            "modules_to_save": (modules, saved),
            "target_parameters": (parameters, getattr(config, "target_parameters", None) or ()),
        }
        for field, (there, names) in asked.items():
            for name in sorted(names):
                if not any(one.endswith(name) for one in there):
                    raise InputError(f"{field}: '{name}' is nowhere in {type(model).__name__}; correct it")


def fuse_lora(network: nn.Module) -> None:
    """
    Compute the plain adapters of linear layers as [`FusedLora`] does, those that are there now; others (DoRA,
    embeddings) stay as they are. What is saved, and loaded elsewhere, is not touched by it.
    """
    for layer in _linear_layers(network):
        plain = [name for name in layer.lora_A if name not in layer.lora_variant and not layer.lora_bias[name]]
        layer.lora_variant.update(dict.fromkeys(plain, FusedLora()))


@contextmanager
def without_casts(network: nn.Module) -> Iterator[None]:
    """
    Inside, inputs of layers whose active adapters are fused are not copied into float32, from which autocast copies
    them back; outside autocast these adapters compute in the type of their input then, as under it. Backward belongs
    inside too, where gradient checkpointing repeats the forward pass.
    """
    layers = [
        layer
        for layer in _linear_layers(network)
        if all(_fused(layer, name) for name in layer.active_adapters if name in layer.lora_A)
    ]
    before = [getattr(layer, "cast_input_dtype_enabled", True) for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


@contextmanager
def merged_lora(network: nn.Module, adapter: str | None) -> Iterator[None]:
    """
    Inside, without gradients, layers multiply by copies of the base's weights with the adapter in them
    ([`mergeable`]), and nothing of it, nor of PEFT, is run beside them. The weights are not touched.
    """
    layers = mergeable(network, adapter)
    try:
        for layer in layers:
            base = layer.get_base_layer()
            merged = FusedLora.merge_safe(layer, adapter, base.weight.data)
            layer.forward = partial(_linear, weight=merged, bias=base.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def mergeable(network: nn.Module, adapter: str | None) -> list[LoraLayer]:
    """The fused layers of `adapter` on a plain matrix that is no other module's too, which nobody hooked."""
    owners = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    return [
        layer
        for layer in _linear_layers(network)
        if _fused(layer, adapter)
        and type(base := layer.get_base_layer()) is nn.Linear
        and owners[id(base.weight)] == 1
        and not (_is_hooked(base) or "forward" in vars(layer))
    ]


@torch.no_grad()
def merged_parameters(network: PeftModel, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The parameters of the model that the base is with `adapter` merged into it, by the base's own names, one at a time.
    Those of layers with the adapter are copies: other adapters stand on the base's, which are not touched.
    """
    model, own = network.get_base_model(), f".modules_to_save.{adapter}."
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        layer, of_base, rest = name.partition(".base_layer.")
        if of_base:
            yield f"{layer}.{rest}", _merged(model.get_submodule(layer), layer, rest, adapter)
        elif ".original_module." in name:
            if name.replace(".original_module.", own) not in parameters:
                yield name.replace(".original_module.", "."), parameter.data
        elif f".{network.prefix}" not in name and (".modules_to_save." not in name or own in name):
            yield name.replace(own, "."), parameter.data


def _merged(layer: BaseTunerLayer, name: str, parameter: str, adapter: str) -> torch.Tensor:
    """PEFT's own merge, into new tensors, behind which the old ones are put back."""
    base = layer.get_base_layer()
    before = {key: own.data for key, own in base.named_parameters(recurse=False)}
    if parameter not in before:
        raise InputError(f"{name}: an adapter of {type(base).__name__} cannot be merged; target linear layers")
    try:
        layer.merge(safe_merge=True, adapter_names=[adapter])
        return base.get_parameter(parameter).data
    finally:
        for key, data in before.items():
            base.get_parameter(key).data = data
        layer.merged_adapters.clear()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """
    `F.linear`; the few rows of a decoding step in float32 as MKL multiplies them faster, from the right: SmolLM2's
    weights by 16 to 48 rows in three quarters of the time, by fewer than 9 or more than 63 in more.
    """
    rows = x.numel() // x.size(-1)
    if bias is None and 9 <= rows < 64 and x.dtype == torch.float32 and x.device.type == "cpu" and _has_mkl:
        return weight.mm(x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


_has_mkl = torch.backends.mkl.is_available()


def _linear_layers(network: nn.Module) -> list[LoraLayer]:
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    return [layer for layer in layers if isinstance(layer.get_base_layer(), nn.Linear)]


def _fused(layer: LoraLayer, adapter: str | None) -> bool:
    return isinstance(layer.lora_variant.get(adapter), FusedLora)


class _AddLoRA(torch.autograd.Function):
    """
    `result + s (x A^T) B^T` in place of `result = x W^T + b` with `W` and `b` frozen, both ways: the gradient of `x`
    through the adapter is added by its matrix product to the one through `W`, where autograd would make two tensors
    and a third. Takes `x` (..., in), the base's `result` (..., out) cut from its graph, `W` (out, in), `A` (r, in),
    `B` (out, r). No second derivatives.
    """

    @staticmethod
    def forward(ctx, x, result, weight, down, up, scaling):
        flat = x.reshape(-1, x.size(-1))
        inner = flat.mm(down.t()).mul_(scaling)
        *_, of_down, of_up, _ = ctx.needs_input_grad
        ctx.save_for_backward(flat if of_down else None, inner if of_up else None, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        result.view(-1, result.size(-1)).addmm_(inner, up.t())
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, inner, weight, down, up = ctx.saved_tensors
        of_x = of_down = of_up = None
        with torch.autocast(grad.device.type, enabled=False):  # the types are those of the forward pass
            grad = grad.reshape(-1, grad.size(-1))
            of_inner = grad.mm(up).mul_(ctx.scaling)
            if ctx.needs_input_grad[0]:
                of_x = grad.mm(weight).addmm_(of_inner, down).view(ctx.shape)
            if flat is not None:
                of_down = of_inner.t().mm(flat)
            if inner is not None:
                of_up = grad.t().mm(inner)
        return of_x, None, None, of_down, of_up, None


def _is_alone_on_plain_weights(layer: LoraLayer, adapter: str, x: torch.Tensor, result: torch.Tensor) -> bool:
    """The one active adapter, without dropout, and `result` is `x W^T` plus a constant that nobody else has seen."""
    base, dropout = layer.base_layer, layer.lora_dropout[adapter]
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and not (base.weight.requires_grad or base.bias is not None and base.bias.requires_grad)
        and [name for name in layer.active_adapters if name in layer.lora_A] == [adapter]
        and (isinstance(dropout, nn.Identity) or dropout.p == 0 or not dropout.training)
        and x.dtype == result.dtype == base.weight.dtype
        and result.is_contiguous()
        and not _is_hooked(base)
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody sees or changes what the module takes, gives, or gets for a gradient."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or _has_any_global_hook()


class FusedLora(LoraVariant):
    """
    `W x + s B A x`, where the second product is scaled while it is r wide and added by the matrix product that makes
    it. PEFT makes it, scales it and adds it, three passes over a tensor as large as the output. With [`without_casts`]
    a layer of SmolLM2-135M takes three fifths of the time on a CPU in bfloat16, forward, and nine tenths in float32.

    Differs from PEFT: rounding (https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py).
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing beyond PEFT's own."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`x` (..., in) and the base's `result` (..., out): their sum with the adapter's product, (..., out)."""
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        if not torch.is_autocast_enabled(x.device.type):
            down = down.to(x.dtype)
        if torch.is_grad_enabled() and _is_alone_on_plain_weights(module, active_adapter, x, result):
            weight, scaling = module.base_layer.weight, module.scaling[active_adapter]
            return _AddLoRA.apply(x, result.detach(), weight, down.to(x.dtype), up.to(x.dtype), scaling)
        inner = F.linear(module.lora_dropout[active_adapter](x), down) * module.scaling[active_adapter]
        up = up.to(inner.dtype)
        if inner.dtype != result.dtype:  # a base that computes in another type than autocast's
            return result + F.linear(inner, up)
        flat, inner = result.reshape(-1, result.size(-1)), inner.reshape(-1, inner.size(-1))
        if torch.is_grad_enabled() or not result.is_contiguous() or _is_hooked(module.base_layer):
            return torch.addmm(flat, inner, up.t()).view(result.shape)
        flat.addmm_(inner, up.t())  # nobody else has seen the base's output
        return result

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

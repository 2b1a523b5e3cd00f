"""Stand-ins for the layers that bitsandbytes quantises, without data, that take as many bytes: for predictions."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


def pack_linear_layers(model: PreTrainedModel, bits: int, compute: torch.dtype, cuda: bool) -> None:
    """Every linear layer but the LM head, as bitsandbytes does."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and linear is not head:
                setattr(parent, name, PackedLinear(linear, bits, compute, cuda))


class PackedLinear(nn.Linear):
    """A frozen layer in 4 bits (NF4 with double quantisation) or 8."""

    def __init__(self, linear: nn.Linear, bits: int, compute: torch.dtype, cuda: bool):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        count = self.weight.numel()
        # 4 bits: a byte of scale for 64 weights, and four for 256 of those
        size = count // 2 + count // 64 + 4 * (count // 64 // 256) if bits == 4 else count + 4 * self.out_features
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.compute, self.bits, self.integers = compute, bits, bits == 8 and cuda

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        product = _Product.apply(x.to(self.compute), self.weight, shape, self.bias, self.bits, self.integers)
        return product.to(x.dtype)


class _Product(torch.autograd.Function):
    """
    With a weight that is unpacked for it and forgotten; of integers forward with 8 bits on a GPU. With 8 bits the
    input is kept outside autograd's own store, so that checkpointing does not free it.

    Source: github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/autograd/_functions.py
    """

    @staticmethod
    def forward(ctx, x, packed, shape, bias, bits, integers):
        ctx.shape = shape
        if bits == 8 and ctx.needs_input_grad[0]:
            ctx.kept = x
        if not integers:
            return F.linear(x, packed.new_empty(shape, dtype=x.dtype), bias)
        rows = _as_int8(x.half())
        sums = rows.new_empty(*rows.shape[:-1], shape[0], dtype=torch.int32)
        return sums.new_empty(sums.shape, dtype=torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None, None, None


def _as_int8(x: torch.Tensor) -> torch.Tensor:
    _ = x.abs() >= 6  # how it finds outliers; here for the bytes
    return x.new_empty(x.shape, dtype=torch.int8)

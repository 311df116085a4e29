"""The optimizers: groups of weights with their own decay and rate, and Muon."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from src.backbones import layer_groups
from src.networks import Network
from src.params import Train

MOMENTUM = 0.95

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Of the five quintic iterations, chosen together to bring singular values near to 1 (Jordan et al. 2024, speedrun)."""


def make_optimizer(network: Network, params: Train, *, fused: bool, dtype: torch.dtype = torch.float32) -> Optimizer:
    """Make the optimizer, with groups of weights; norms and biases have no weight decay (He et al. 2019).

    `lr_scale` of a group is its share of the learning rate. Fused steps give the same bits on every CPU. dtype: in
    which Muon multiplies matrices.
    """
    backbone = list(network.backbone.children())[-1:]
    groups = [
        group
        for module in backbone
        for group in layer_groups(module, weight_decay=params.weight_decay, layer_decay=params.layer_decay)
    ]
    own = list(network.layers.parameters())
    groups += [
        {"params": [one for one in own if one.ndim > 1], "weight_decay": params.weight_decay, "lr_scale": 1.0},
        {"params": [one for one in own if one.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if params.optimizer == "sgd":
        return SGD(groups, lr=params.lr, momentum=0.9, nesterov=True, fused=fused)
    if params.optimizer == "muon":
        return Muon(groups, lr=params.lr, fused=fused, dtype=dtype)
    kind = AdamW if params.optimizer == "adamw" else Adam
    return kind(groups, lr=params.lr, fused=fused)


class Muon(AdamW):
    """AdamW, but matrices step along their orthogonalized Nesterov momentum (Jordan et al. 2024).

    The filters of a convolution, (out, in, H, W), are one matrix, (out, in * H * W). A step is as large as one of AdamW
    (Liu et al. 2025, "Muon is scalable for LLM training"), so that rate and decay mean the same. Of the state of AdamW,
    a matrix has `step` and `exp_avg` alone.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, fused: bool, dtype: torch.dtype) -> None:
        super().__init__(groups, lr=lr, fused=fused)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the matrices, then all else as AdamW does. Takes the gradients of the matrices away."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and is_matrix(weight):
                    self._step_matrix(weight, weight.grad, group["lr"], group["weight_decay"])
                    weight.grad = None  # so that AdamW passes it over
        super().step(closure)

    def _step_matrix(self, weight: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        state = self.state[weight]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight)}
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)
        size = 0.2 * math.sqrt(max(matrix.shape))  # the root mean square of AdamW's steps
        weight.mul_(1 - lr * decay)
        weight.add_(orthogonalize(matrix.to(self.dtype)).view(weight.shape), alpha=-lr * size)


def is_matrix(weight: Tensor) -> bool:
    """Tell whether weights map many inputs to many outputs: norms, biases and depthwise convolutions do not."""
    return weight.ndim > 1 and weight.shape[1] > 1


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near to 1, and keep its singular vectors: (M, N) -> same.

    Newton-Schulz iterations, which need products alone and stand a dtype of few digits. A matrix of zeros stays.
    """
    wide: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found: Tensor = wide / wide.norm().clamp(min=1e-7)  # no singular value is larger than 1
    for first, third, fifth in COEFFICIENTS:
        square = found @ found.T
        found = torch.addmm(found, torch.addmm(square, square, square, beta=third, alpha=fifth), found, beta=first)
    return found.T if matrix.shape[0] > matrix.shape[1] else found

"""Muon steps matrices along orthogonal directions, as timm's does, and all else as AdamW does."""

import copy

import pytest
import torch
from timm.optim.muon import Muon as TimmsMuon
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from src.optimizers import Muon, is_matrix, orthogonalize


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64), (32, 288), (288, 32), (10, 256)], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_orthogonalizing_brings_singular_values_near_to_one_and_keeps_the_vectors(
    shape: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    matrix = noise(*shape) * scale
    found = orthogonalize(matrix.to(dtype))
    assert (found.dtype, found.shape) == (dtype, matrix.shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ found.float() @ right.T
    strong = values > 0.05 * values.max()  # the weakest ones are still on their way
    assert strong.sum() > 0.9 * len(values)
    assert (torch.diag(turned)[strong] - 1).abs().max() < 0.25
    assert (turned - torch.diag(torch.diag(turned))).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-3)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


class Small(nn.Sequential):
    """Few filters of many outputs, depthwise ones, a normalisation and a head, in the memory format of training."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 24, 3, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, groups=24),
            nn.Flatten(),
            nn.Linear(24 * 16, 10),
        )
        for seed, weight in enumerate(self.parameters()):
            weight.data = noise(*weight.shape, seed=seed) / 8
        self.to(memory_format=torch.channels_last)


def groups(network: nn.Module, *, matrices: bool | None = None) -> list[dict[str, object]]:
    weights = [one for one in network.parameters() if matrices is None or is_matrix(one) == matrices]
    kinds = [(0.3, [one for one in weights if one.ndim > 1]), (0.0, [one for one in weights if one.ndim <= 1])]
    return [{"params": params, "weight_decay": decay} for decay, params in kinds if params]


def test_only_weights_that_map_many_inputs_to_many_outputs_are_matrices() -> None:
    assert [name for name, weight in Small().named_parameters() if is_matrix(weight)] == ["0.weight", "5.weight"]


@pytest.mark.parametrize("fused", [True, False])
def test_five_steps_are_those_of_timm_for_matrices_and_of_adamw_for_all_else(*, fused: bool) -> None:
    mine, theirs, lr = Small(), Small(), 0.01
    begun = copy.deepcopy(list(mine.parameters()))
    muon = Muon(groups(mine), lr=lr, fused=fused, dtype=torch.bfloat16)
    references = [
        TimmsMuon(groups(theirs, matrices=True), lr=lr, momentum=0.95, nesterov=True),
        AdamW(groups(theirs, matrices=False), lr=lr),
    ]
    for step in range(5):
        images, labels = noise(32, 2, 8, 8, seed=step), torch.arange(32) % 10
        for network, optimizers in ((mine, [muon]), (theirs, references)):
            network.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
    for one, other, former in zip(mine.parameters(), theirs.parameters(), begun, strict=True):
        moved = (one - former).norm()
        assert moved > 0.01 * former.norm()
        assert (one - other).norm() < 0.01 * moved


def test_a_weight_without_a_gradient_stays_and_has_no_state() -> None:
    network = Small()
    before = copy.deepcopy(network.state_dict())
    optimizer = Muon(groups(network), lr=0.01, fused=True, dtype=torch.float32)
    optimizer.step()
    assert all(torch.equal(before[name], weight) for name, weight in network.state_dict().items())
    assert not optimizer.state

"""Aggregation as the authors' codes do it: dense products of one kernel, in PyTorch.

Written from the papers for comparison. Each function takes `a [K, d_in, r]`, `b [K, r, d_out]` and
weights `p [K]` of sum one, and returns factors or a dense matrix.
"""

from collections.abc import Callable
from typing import Any

try:
    import torch
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "the dense reference needs PyTorch: pip install -e '.[parity]', "
        "or leave it out with --noreference"
    ) from error


def mean_of_products(a: Any, b: Any, p: Any) -> Any:
    """The ideal update, as a dense matrix."""
    total = torch.zeros(a.shape[1], b.shape[2])
    for weight, x, y in zip(p, a, b, strict=True):
        total += weight * (x @ y)
    return total


def means(a: Any, b: Any, p: Any) -> tuple[Any, Any]:
    """The mean of each factor."""
    return torch.tensordot(p, a, 1), torch.tensordot(p, b, 1)


def stacking(a: Any, b: Any, p: Any) -> tuple[Any, Any]:
    """FLoRA: the factors side by side."""
    count, d_in, rank = a.shape
    left = a.permute(1, 0, 2).reshape(d_in, count * rank)
    return left, (p[:, None, None] * b).reshape(count * rank, -1)


def svd_lowrank(a: Any, b: Any, p: Any) -> tuple[Any, Any]:
    """FlexLoRA by a randomised SVD of the dense mean."""
    rank = a.shape[2]
    u, s, v = torch.svd_lowrank(mean_of_products(a, b, p), q=4 * rank)
    return u[:, :rank], s[:rank, None] * v[:, :rank].T


def svd_full(a: Any, b: Any, p: Any) -> tuple[Any, Any]:
    """FlexLoRA by a full SVD of the dense mean."""
    rank = a.shape[2]
    u, s, v = torch.linalg.svd(mean_of_products(a, b, p), full_matrices=False)
    return u[:, :rank], s[:rank, None] * v[:rank]


def svd_by_qr(a: Any, b: Any, p: Any) -> tuple[Any, Any]:
    """FlexLoRA without the dense mean, as the best of other codes do it."""
    left, right = stacking(a, b, p)
    rank = a.shape[2]
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u[:, :rank], s[:rank, None] * (v[:rank] @ q_right.T)


def fedex(a: Any, b: Any, p: Any) -> Any:
    """FedEx-LoRA: the dense residual."""
    mean_a, mean_b = means(a, b, p)
    return mean_of_products(a, b, p) - mean_a @ mean_b


def fair_sgd(steps: int, learning_rate: float = 0.01, penalty: float = 0.01) -> Callable[..., Any]:
    """LoRA-FAIR: gradient descent on the cosine of dense matrices."""

    def solve(a: Any, b: Any, p: Any) -> tuple[Any, Any]:
        mean_a, mean_b = means(a, b, p)
        ideal = mean_of_products(a, b, p).flatten()
        correction = torch.zeros_like(mean_b, requires_grad=True)
        optimiser = torch.optim.SGD([correction], lr=learning_rate)
        for _ in range(steps):
            optimiser.zero_grad()
            product = (mean_a @ (mean_b + correction)).flatten()
            cosine = torch.nn.functional.cosine_similarity(ideal, product, dim=0)
            (1 - cosine + penalty * correction.square().sum()).backward()
            optimiser.step()
        return mean_a, mean_b + correction.detach()

    return solve


def flora_na_descent(steps: int, learning_rate: float = 0.01) -> Callable[..., Any]:
    """FLoRA-NA: Adam on the coefficients, through dense matrices."""

    def solve(a: Any, b: Any, p: Any) -> tuple[Any, Any]:
        ideal = mean_of_products(a, b, p)
        q_a, p_b = p.clone().requires_grad_(), p.clone().requires_grad_()
        optimiser = torch.optim.Adam([q_a, p_b], lr=learning_rate)
        for _ in range(steps):
            optimiser.zero_grad()
            product = torch.tensordot(q_a, a, 1) @ torch.tensordot(p_b, b, 1)
            (ideal - product).square().sum().backward()
            optimiser.step()
        return torch.tensordot(q_a, a, 1).detach(), torch.tensordot(p_b, b, 1).detach()

    return solve

"""A linear regression over clients, and its optimum in closed form."""

from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """Clients' examples, the pretrained kernel, and what is known of the loss in closed form.

    With p_k = 1 / K, the loss of a kernel W is

        L(W) = sum_k p_k |X_k W - Y_k|^2 / (2 n) = L(W*) + tr((W - W*)^T H (W - W*)) / 2

    with `H = sum_k p_k X_k^T X_k / n` and `W* = H^-1 sum_k p_k X_k^T Y_k / n`.

    Attributes:
      x: Inputs, float32 `[K, n, d_in]`.
      y: Outputs, float32 `[K, n, d_out]`.
      pretrained: The kernel W_0 that is frozen, float32 `[d_in, d_out]`.
      optimum: W*, float64 `[d_in, d_out]`.
      curvature: H, float64 `[d_in, d_in]`.
    """

    x: np.ndarray
    y: np.ndarray
    pretrained: np.ndarray
    optimum: np.ndarray
    curvature: np.ndarray


def draw(
    seed: int,
    *,
    clients: int,
    heterogeneity: float,
    inputs: int = 32,
    outputs: int = 32,
    examples: int = 64,
    noise: float = 0.1,
    decay: float = 1.0,
    shift: float = 0.3,
) -> Problem:
    r"""Draws a problem; all of it follows from the seed.

    Client k has :math:`y = x (W_0 + C + h C_k) + \text{noise}`. C, common to all, and each
    :math:`C_k` have random singular vectors and singular values :math:`i^{-\text{decay}}`, scaled
    to a Frobenius norm of 1, so that no adapter of a small rank holds them. The mean of the
    :math:`C_k` is taken from each: with equal inputs, the optimum is the same for every h. Inputs
    are normal; each client has its own scale of each feature, whose logarithm has a standard
    deviation of `shift` times h.

    Seeds that differ in nothing but the heterogeneity share all draws.

    Args:
      seed: Of everything.
      clients: K.
      heterogeneity: h.
      inputs: d_in.
      outputs: d_out.
      examples: n, of each client.
      noise: Standard deviation.
      decay: Of the spectra.
      shift: See above.

    Raises:
      ValueError: If there are fewer examples than inputs, which leaves the optimum open.
    """
    if clients * examples < inputs:
        raise ValueError(
            f"{clients} clients with {examples} examples each do not determine a kernel of "
            f"{inputs} inputs: expected {inputs} examples at least"
        )
    generator = np.random.default_rng(seed)
    pretrained = generator.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    common = _spectral(generator, inputs, outputs, decay)
    own = np.stack([_spectral(generator, inputs, outputs, decay) for _ in range(clients)])
    own -= own.mean(axis=0)
    scales = np.exp(heterogeneity * shift * generator.normal(size=(clients, 1, inputs)))
    x = (scales * generator.normal(size=(clients, examples, inputs))).astype(np.float32)
    kernels = pretrained + common + heterogeneity * own
    y = x @ kernels + noise * generator.normal(size=(clients, examples, outputs))
    y = y.astype(np.float32)
    return Problem(x, y, pretrained.astype(np.float32), *closed_form(x, y))


def closed_form(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`W*` and `H` of `Problem` in float64, from inputs and outputs."""
    x, y = (values.reshape(-1, values.shape[-1]).astype(np.float64) for values in (x, y))
    curvature = x.T @ x / len(x)
    return np.linalg.solve(curvature, x.T @ y / len(x)), curvature


def excess(kernel: Any, optimum: Any, curvature: Any) -> Any:
    """`L(W) - L(W*)` of a kernel W, by NumPy or by JAX, whatever the arrays are."""
    difference = kernel - optimum
    return ((curvature @ difference) * difference).sum() / 2


def best_of_rank(drawn: Problem, rank: int) -> float:
    """The least relative excess loss of any kernel that differs from W_0 by a matrix of that rank.

    `tr(D^T H D)` is the squared Frobenius norm of `H^(1/2) D`, of which a truncated singular value
    decomposition leaves the least.
    """
    difference = drawn.optimum - drawn.pretrained.astype(np.float64)
    root = np.linalg.cholesky(drawn.curvature).T
    energy = np.linalg.svd(root @ difference, compute_uv=False) ** 2
    return float(energy[rank:].sum() / energy.sum())


def _spectral(
    generator: np.random.Generator, inputs: int, outputs: int, decay: float
) -> np.ndarray:
    """A matrix of Frobenius norm 1 with random singular vectors and decaying singular values."""
    count = min(inputs, outputs)
    values = np.arange(1, count + 1.0) ** -decay
    left, _ = np.linalg.qr(generator.normal(size=(inputs, count)))
    right, _ = np.linalg.qr(generator.normal(size=(outputs, count)))
    return left * (values / np.linalg.norm(values)) @ right.T

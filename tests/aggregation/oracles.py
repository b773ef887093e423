"""What every aggregation function must return, written with dense float64 matrices.

Each oracle takes `a [K, d_in, r]`, `b [K, r, d_out]`, weights `p [K]` that sum to one, and
hyperparameters, and returns the dense change `residual + adapters` of one kernel.
"""

import numpy as np
import scipy.optimize


def ideal(a, b, p):
    return sum(w * x @ y for w, x, y in zip(p, a, b))


def means(a, b, p):
    return sum(w * x for w, x in zip(p, a)), sum(w * y for w, y in zip(p, b))


def best(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def first(x, p):
    return x[np.flatnonzero(p > 0)[0]]


def fedit(a, b, p):
    mean_a, mean_b = means(a, b, p)
    return mean_a @ mean_b


def ffa_lora(a, b, p, initial=None):
    frozen = first(a, p) if initial is None else initial[0]
    return frozen @ means(a, b, p)[1]


def rolora(a, b, p, trained):
    mean_a, mean_b = means(a, b, p)
    return first(a, p) @ mean_b if trained in ("b", True) else mean_a @ first(b, p)


def flexlora(a, b, p, rank=None):
    return best(ideal(a, b, p), a.shape[2] if rank is None else rank)


def hetlora_weights(kernels, p):
    sizes = np.array(
        [
            np.sqrt(sum(np.linalg.norm(a[k] @ b[k]) ** 2 for a, b in kernels)) if p[k] > 0 else 0
            for k in range(len(p))
        ]
    )
    return sizes / sizes.sum() if sizes.sum() > 0 else p


def fedex_lora(a, b, p, rank=None):
    mean_a, mean_b = means(a, b, p)
    residual = ideal(a, b, p) - mean_a @ mean_b
    return mean_a @ mean_b + (residual if rank is None else best(residual, rank))


def frlora(a, b, p, initial):
    mean_a, mean_b = means(a, b, p)
    return (mean_a @ mean_b - initial[0] @ initial[1]) + initial[0] @ initial[1]


def rotation(core, reflections=False):
    u, _, v = np.linalg.svd(core)
    if not reflections:
        u[:, -1] *= np.sign(np.linalg.det(u @ v))
    return u @ v


def fedrot_lora(a, b, p, reference, aligned, strength=1.0, reflections=False):
    turned = []
    for x, y in zip(a, b):
        core = y @ reference[1].T if aligned in ("b", True) else x.T @ reference[0]
        turn = rotation(core, reflections)
        turn = rotation((1 - strength) * np.eye(len(turn)) + strength * turn, reflections=True)
        turned.append((x @ turn, turn.T @ y))
    return sum(w * x for w, (x, _) in zip(p, turned)) @ sum(w * y for w, (_, y) in zip(p, turned))


def spectral_energy(a, b, p, threshold, rank=None):
    matrix = ideal(a, b, p)
    s = np.linalg.svd(matrix, compute_uv=False)
    enough = np.flatnonzero(np.cumsum(s**2) >= threshold * np.sum(s**2) * (1 - 1e-12))[0] + 1
    return best(matrix, min(enough, a.shape[2] if rank is None else rank))


def spectral_noise(a, b, p, rank):
    """ScreeNOT as the paper states it, its root found by another method."""
    matrix = ideal(a, b, p)
    s = np.linalg.svd(matrix, compute_uv=False)[: len(a) * a.shape[2]]
    count = len(s)
    bound = min(rank, (count - 1) // 2)
    z = s.copy()
    for i in range(bound):
        share = (1 - (i / bound) ** (2 / 3)) / (2 ** (2 / 3) - 1)
        z[i] = s[bound] + share * (s[bound] - s[2 * bound])
    gamma = count / max(matrix.shape)

    def log_d(y):
        phi = np.mean(y / (y**2 - z**2))
        return np.log(phi) + np.log(gamma * phi + (1 - gamma) / y)

    def equation(y):
        step = 1e-6 * y
        return y * (log_d(y + step) - log_d(y - step)) / (2 * step) + 4

    top = z.max()
    threshold = scipy.optimize.brentq(equation, top * 1.0001, top * 10)
    return best(matrix, min(max(int(np.sum(s > threshold)), 1), rank))


def lora_fair(
    a,
    b,
    p,
    similarity="cosine",
    solver="sgd",
    regularization=0.01,
    steps=1000,
    learning_rate=0.01,
    correct="b",
    start=None,
    units="relative",
):
    """Gradient descent on the dense matrices, the gradients of section 2 by hand."""
    if correct == "a":
        a, b = (np.swapaxes(x, 1, 2) for x in (b, a))
    unit_a, unit_b = (np.linalg.norm(x) if units == "relative" else 1 for x in means(a, b, p))
    a, b = a / unit_a, b / unit_b
    fixed, moving = means(a, b, p)
    matrix = ideal(a, b, p)

    def result(moved):
        product = unit_a * unit_b * fixed @ moved
        return product if correct == "b" else product.T

    gram = fixed.T @ fixed
    if solver == "closed_form":
        eye = np.eye(len(gram))
        return result(
            np.linalg.pinv(gram + regularization * eye)
            @ (fixed.T @ matrix + regularization * moving)
        )
    if similarity == "frobenius":
        learning_rate = min(learning_rate, 0.5 / (np.trace(gram) + regularization))
    held = similarity == "cosine" and units == "relative"
    axis = {"feature_cosine": 1 if correct == "b" else 0}.get(similarity)
    c = np.zeros_like(moving) if start is None else start
    for _ in range(steps):
        x = fixed @ (moving + c)
        rate = learning_rate
        if similarity == "frobenius":
            slope = 2 * (x - matrix)
        else:
            along = np.sum(x * matrix, axis=axis, keepdims=True)
            size_m = np.sqrt(np.sum(matrix**2, axis=axis, keepdims=True))
            size_x = np.sqrt(np.sum(x**2, axis=axis, keepdims=True))
            both = size_m * size_x
            safe = np.where(both > 0, both, 1)
            slope = np.where(
                both > 0, along * x / np.where(size_x > 0, safe * size_x**2, 1) - matrix / safe, 0
            )
            if axis is not None:
                slope = slope / x.shape[1 - axis]
        if held:
            rate = min(rate, 0.25 * np.sum(x**2) / np.linalg.norm(gram, 2))
        c = c - rate * (fixed.T @ slope + 2 * regularization * c)
    if held:
        x = fixed @ (moving + c)
        limit = np.linalg.norm(matrix - fixed @ moving)
        if np.linalg.norm(matrix - x) > limit:
            best = np.sum(x * matrix) / np.sum(x**2)
            inside = limit**2 - np.linalg.norm(matrix - best * x) ** 2
            reach = np.sqrt(max(inside, 0) / np.sum(x**2))
            return result(np.clip(1, best - reach, best + reach) * (moving + c))
    if similarity == "feature_cosine" and units == "relative":
        step = fixed @ c
        gained = np.sum((matrix - fixed @ moving) * step)
        c = np.clip(2 * gained / np.sum(step**2), 0, 1) * c
    return result(moving + c)


def flora_na(kernels, p, sweeps=10):
    """Alternating least squares on vectorised products; one pair for all `kernels` given."""
    count = len(p)
    target = np.concatenate([ideal(a, b, p).ravel() for a, b in kernels])
    coefficients_p, coefficients_q = p.copy(), p.copy()
    here = np.flatnonzero(p > 0)
    for _ in range(sweeps):
        for side in ("p", "q"):
            columns = []
            for k in range(count):
                parts = []
                for a, b in kernels:
                    if side == "p":
                        parts.append(np.tensordot(coefficients_q, a, 1) @ b[k])
                    else:
                        parts.append(a[k] @ np.tensordot(coefficients_p, b, 1))
                columns.append(np.concatenate([part.ravel() for part in parts]))
            design = np.stack(columns, axis=1)[:, here]
            solution = np.zeros(count)
            solution[here] = np.linalg.lstsq(design, target, rcond=None)[0]
            if side == "p":
                coefficients_p = solution
            else:
                coefficients_q = solution
    return [
        np.tensordot(coefficients_q, a, 1) @ np.tensordot(coefficients_p, b, 1) for a, b in kernels
    ]

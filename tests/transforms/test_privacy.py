"""How far one client can move what a private server sees, whatever it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax import methods, transforms
from fedlora_jax.methods import Context, Trained, trained_mask
from fedlora_jax.methods._base import sides

# One that starts from random factors, one from the principal part of the model. What else methods
# do comes after the mean.
PRIVATE = ("fedit", "frlora")
CLIP, CLIENTS = 0.5, 4


def mean_seen(world, name, noise=0.0, cohort_size=None):
    """From uploads and weights to what the method within gets, less the server's own."""

    def spy(server, uploads, weights):
        (one,) = jax.tree.leaves(weights)
        assert one.shape == (1,)
        return server, jax.tree.map(lambda x, own: x[0] - own, uploads, server.trainable)

    inner = methods.get(name)()._replace(aggregate=spy)
    method = transforms.private(inner, clip=CLIP, noise_multiplier=noise, cohort_size=cohort_size)
    server, _ = method.init(jax.random.key(5), world.server)

    def seen(uploads, weights):
        return jax.flatten_util.ravel_pytree(method.aggregate(server, uploads, weights)[1])[0]

    return jax.jit(seen), methods.get(name)().init(jax.random.key(5), world.server)[0].trainable


@pytest.fixture(scope="module", params=PRIVATE)
def private(request, world):
    seen, own = mean_seen(world, request.param)
    generator = np.random.default_rng(0)

    def near(x):
        return x + generator.normal(size=(CLIENTS, *x.shape)).astype(np.float32) / 10

    own = jax.tree.map(np.asarray, own)
    return seen, own, jax.tree.map(near, own)


def replaced(stacked, place, upload):
    """The uploads with that of one client replaced."""

    def put(x, y):
        x = x.copy()
        x[place] = y
        return x

    return jax.tree.map(put, stacked, upload)


def weights(place, weight):
    found = np.ones(CLIENTS, np.float32)
    found[place] = weight
    return found


@st.composite
def uploads(draw, own, honest):
    """What a client might send to do the most: all or a part of it, of any size and sign."""
    part = draw(st.sampled_from(["all", "a", "b", "head", "entry"]))
    toward = draw(st.sampled_from(["random", "others", "against others"]))
    size = 10.0 ** draw(st.integers(-30, 38))
    generator = np.random.default_rng(draw(st.integers(0, 9)))
    wanted = {
        "all": jax.tree.leaves(own),
        "a": jax.tree.leaves(sides(own.adapters, "a")),
        "b": jax.tree.leaves(sides(own.adapters, "b")),
        "head": jax.tree.leaves(own.head),
        "entry": jax.tree.leaves(own)[:1],
    }[part]
    chosen = {id(x) for x in wanted}

    def sent(x, others):
        if id(x) not in chosen:
            return x
        direction = {
            "random": generator.normal(size=x.shape),
            "others": np.sign(np.sum(others - x, axis=0)),
            "against others": -np.sign(np.sum(others - x, axis=0)),
        }[toward]
        if part == "entry":
            direction = direction * (np.arange(x.size) == 0).reshape(x.shape)
        return np.asarray(x + np.clip(size * direction, -3e38, 3e38), np.float32)

    return jax.tree.map(sent, own, honest)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_no_upload_moves_the_mean_by_more_than_the_clip(private, data):
    seen, own, honest = private
    place = data.draw(st.integers(0, CLIENTS - 1))
    one, two = (data.draw(uploads(own, honest)) for _ in range(2))

    def mean(upload, weight=1.0):
        return np.float64(seen(replaced(honest, place, upload), weights(place, weight)))

    absent = mean(one, weight=0.0)
    bound, rounding = CLIP / CLIENTS, 1e-6
    assert np.linalg.norm(mean(one) - absent) <= bound + rounding
    assert np.linalg.norm(mean(one) - mean(two)) <= 2 * bound + rounding


def test_the_bound_is_reached_and_weights_do_not_move_it(private):
    seen, own, honest = private

    def mean(sign, weight):
        upload = jax.tree.map(lambda x: x + sign * np.float32(1e3), own)
        return np.float64(seen(replaced(honest, 1, upload), weights(1, weight)))

    for weight in (1e-3, 1.0, 1e3):
        moved = np.linalg.norm(mean(1, weight) - mean(-1, weight))
        assert moved == pytest.approx(2 * CLIP / CLIENTS, rel=1e-4)


def test_a_norm_beyond_float32_moves_nothing_and_spoils_nothing(private):
    seen, own, honest = private
    changed = replaced(honest, 1, jax.tree.map(lambda x: np.full_like(x, 3e38), own))
    np.testing.assert_array_equal(seen(changed, weights(1, 1)), seen(honest, weights(1, 0)))


@pytest.mark.parametrize(
    ("name", "index"), [("ffa_lora", 0), ("rolora", 0), ("rolora", 1), ("fedit", 0)]
)
def test_what_is_not_trained_takes_nothing_of_the_clip(world, name, index):
    """A factor that rests, and the zeros that a client of rank 1 has in its other columns."""

    def spy(server, uploads, weights):
        return server, jax.tree.map(lambda x, own: x[0] - own, uploads, server.trainable)

    inner = methods.get(name)()._replace(aggregate=spy)
    method = transforms.private(inner, clip=CLIP, noise_multiplier=0.0)
    server, client = method.init(jax.random.key(5), world.server)
    own = jax.tree.map(lambda x: np.asarray(x) + 1, server.trainable)
    server = server._replace(trainable=own, round=jnp.int32(index))
    start = method.start(server, client, Context(jax.random.key(0), None, jnp.int32(1)))
    start = start._replace(rank=1)
    cut = {path: jax.tree.map(np.copy, f) for path, f in own.adapters.items()}
    for a, b in cut.values():
        a[:, 1:], b[1:] = 0, 0
    moves = jax.tree.map(np.asarray, trained_mask(start))
    moved = jax.tree.map(lambda x, m: np.float32(x + 0.1 * m), own._replace(adapters=cut), moves)
    upload, _ = method.finish(server, client, start, Trained(moved, moved))
    _, seen = method.aggregate(server, jax.tree.map(lambda x: x[None], upload), jnp.ones(1))
    change = jax.tree.map(lambda x, y: x - y, moved, own)
    wanted = jax.tree.map(lambda x, m: np.where(m, x, 0), change, moves)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(wanted)))
    assert norm > CLIP
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y * CLIP / norm, rtol=1e-4, atol=1e-6),
        seen,
        wanted,
    )


def test_clipped_changes_are_summed_with_all_digits(world):
    """Or an accelerator would round some of them above the clip."""
    seen, own = mean_seen(world, "fedit")
    stacked = jax.tree.map(lambda x: jnp.stack([x] * CLIENTS), own)
    text = str(jax.make_jaxpr(seen)(stacked, jnp.ones(CLIENTS)))
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") == len(products)
    assert products


def test_places_of_nobody_do_not_count(world):
    """A cohort of three on four devices: the same mean and the same noise as on one."""
    three, own = mean_seen(world, "fedit", noise=2.0)
    four, _ = mean_seen(world, "fedit", noise=2.0, cohort_size=3)
    sent = jax.tree.map(lambda x: jnp.stack([x + 0.1 * k for k in range(4)]), own)
    alone = three(jax.tree.map(lambda x: x[:3], sent), jnp.ones(3))
    np.testing.assert_allclose(four(sent, jnp.array([1.0, 1, 1, 0])), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cohort_size", [None, 2])
def test_noise_is_of_all_that_the_server_sees(world, cohort_size):
    noise = 30.0
    seen, own = mean_seen(world, "fedit", noise, cohort_size)
    nothing = jax.tree.map(lambda x: jnp.stack([x] * CLIENTS), own)
    values = np.float64(seen(nothing, jnp.ones(CLIENTS)))
    deviation = noise * CLIP / (cohort_size or CLIENTS)
    # Within 5 of the standard errors of mean and deviation.
    assert abs(values.mean()) < 5 * deviation / np.sqrt(len(values))
    assert abs(values.std() / deviation - 1) < 5 / np.sqrt(2 * len(values))


@pytest.mark.parametrize(("noise", "rounds"), [(2.0, 1), (6.0, 12), (20.0, 200)])
def test_epsilon_without_sampling_is_just_above_the_exact_one(noise, rounds):
    """Rounds of Gaussian noise are one round of less; a replaced client moves twice the clip."""
    library = pytest.importorskip("dp_accounting")
    exact = library.get_epsilon_gaussian(noise / 2 / np.sqrt(rounds), 1e-5)
    found = transforms.epsilon(
        noise_multiplier=noise, num_clients=9, cohort_size=9, rounds=rounds, delta=1e-5
    )
    assert exact < found < 1.15 * exact


def test_a_cohort_of_no_one_is_refused():
    with pytest.raises(ValueError, match="private: cohort_size must be"):
        transforms.private(methods.fedit(), clip=1.0, noise_multiplier=1.0, cohort_size=0)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax.data import images


def test_normalize_maps_bytes_to_plus_minus_one():
    pixels = jnp.array([[0, 255], [51, 204]], jnp.uint8)
    np.testing.assert_allclose(images.normalize(pixels), [[-1, 1], [-0.6, 0.6]], rtol=0, atol=1e-6)


def test_published_statistics():
    pixels = jnp.array([[[0, 128, 255]]], jnp.uint8)
    for name, (mean, deviation) in images.STATISTICS.items():
        wanted = (np.array([0, 128, 255]) / 255 - mean) / deviation
        np.testing.assert_allclose(images.normalize(pixels, name)[0, 0], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="'clip' are of 3 channels, the images have 1"):
        images.normalize(pixels[..., :1], "clip")
    with pytest.raises(ValueError, match="Did you mean 'imagenet'"):
        images.normalize(pixels, "image_net")


def test_no_distortion_is_the_identity():
    batch = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    same = images.random_affine(jax.random.key(1), batch, shift=0.0, distortion=0.0)
    np.testing.assert_allclose(same, batch, atol=1e-6)


def test_a_linear_image_is_only_moved():
    # Linear interpolation reproduces a ramp, away from the border, whatever the transformation.
    rows, columns = np.mgrid[0:16, 0:16].astype(np.float32)
    batch = np.stack([rows, columns], axis=-1)[None].repeat(3, axis=0)
    moved = images.random_affine(jax.random.key(2), batch, shift=1.0, distortion=0.1)
    inner = np.asarray(moved)[:, 3:-3, 3:-3] - batch[:, 3:-3, 3:-3]
    assert np.abs(inner).max() <= 1.0 + 2 * 0.1 * 7.5
    second = np.diff(np.diff(inner, axis=1), axis=1)
    np.testing.assert_allclose(second, 0, atol=1e-4)
    assert not np.allclose(inner[0], inner[1])  # each image is moved on its own

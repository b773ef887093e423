"""Pretrained weights of others, read into our backbones.

    model, params = pretrained.from_pretrained("path/to/Llama-3.2-1B", dtype=jnp.bfloat16)

Sources are safetensors with the names of Hugging Face and timm, sharded or not, the `.npz` files of
the original ViT and Mixer releases, and GGUF files of Llama-architecture models (extra `gguf`): as
a file, a directory, or a name on the Hugging Face hub (extra `hub`). Tensors are read in pieces,
straight into the layout and type that are wanted: on CPU, memory peaks at the parameters
themselves, and the pages of a GGUF file, which is mapped.
"""

from fedlora_jax.models.pretrained.configs import model_from_config
from fedlora_jax.models.pretrained.files import locate
from fedlora_jax.models.pretrained.languages import Language, read_language
from fedlora_jax.models.pretrained.loading import from_pretrained, load, model_of, resize_positions

__all__ = [
    "Language",
    "from_pretrained",
    "load",
    "locate",
    "model_from_config",
    "model_of",
    "read_language",
    "resize_positions",
]

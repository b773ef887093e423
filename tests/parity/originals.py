"""Small torch originals with random weights, saved in the formats in which they are released."""

import json

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
LLAMA_3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """With other values of every parameter: biases of zero and norms of one would hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(0.15 * torch.randn_like(parameter) + is_norm)
    return module.eval()


def vit(image_size: int = 32) -> nn.Module:
    config = transformers.ViTConfig(**SIZES, image_size=image_size, patch_size=8, num_labels=5)
    return randomised(transformers.ViTForImageClassification(config))


def bert(kind: str = "BertForSequenceClassification") -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, vocab_size=50, max_position_embeddings=24, num_labels=5, pad_token_id=0
    )
    return randomised(getattr(transformers, kind)(config))


def roberta(kind: str = "Roberta") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        **SIZES,
        vocab_size=50,
        max_position_embeddings=26,
        num_labels=5,
        type_vocab_size=1,
        pad_token_id=1,
    )
    return randomised(getattr(transformers, f"{kind}ForSequenceClassification")(config))


def llama(tied: bool = False, rope: dict | None = None) -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES,
        vocab_size=50,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        pad_token_id=0,
    )
    return randomised(transformers.LlamaForCausalLM(config))


def images(size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)


def texts(pad: int, length: int = 16) -> np.ndarray:
    """Token ids, padded on the right."""
    tokens = np.random.default_rng(0).integers(3, 50, size=(3, length))
    tokens[1, length - 5 :] = pad
    tokens[2, length - 1 :] = pad
    return tokens


def forward(model: nn.Module, inputs: np.ndarray, pad: int | None = None) -> torch.Tensor:
    """Logits of an original for inputs of ours."""
    if inputs.ndim == 4:
        output = model(torch.tensor(inputs.transpose(0, 3, 1, 2)))
    else:
        mask = None if pad is None else torch.tensor((inputs != pad).astype(np.int64))
        output = model(torch.tensor(inputs), attention_mask=mask)
    return output.logits if hasattr(output, "logits") else output


class TimmMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class TimmMixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp_tokens = TimmMLP(tokens, width // 2)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp_channels = TimmMLP(width, 4 * width)

    def forward(self, x):
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class TimmMixer(nn.Module):
    """The twin of timm's MlpMixer, with timm's names; timm itself needs torchvision."""

    def __init__(self, width=32, depth=2, patch_size=8, image_size=32, num_classes=5):
        super().__init__()
        self.stem = nn.Module()
        self.stem.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        tokens = (image_size // patch_size) ** 2
        self.blocks = nn.ModuleList(TimmMixerBlock(tokens, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        x = self.stem.proj(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class TimmAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class TimmViTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = TimmAttention(width, heads), TimmMLP(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    """The twin of timm's VisionTransformer, with timm's names."""

    def __init__(self, width=32, depth=2, heads=4, patch_size=8, image_size=32, num_classes=5):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.blocks = nn.Sequential(*(TimmViTBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def save(model: nn.Module, directory) -> None:
    """As the original's own library saves it."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), directory / "model.safetensors")


def original_vit_arrays(twin: TimmViT, heads: int = 4) -> dict[str, np.ndarray]:
    """The weights of timm's twin under the names and in the shapes of the original ViT release."""
    state = {name: value.numpy() for name, value in twin.state_dict().items()}
    arrays = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        **_norm("Transformer/encoder_norm", state, "norm"),
        **_dense("head", state, "head"),
    }
    for i in range(len(twin.blocks)):
        mine, theirs = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{mine}/MultiHeadDotProductAttention_1"
        kernels = np.split(state[f"{theirs}.attn.qkv.weight"], 3)
        biases = np.split(state[f"{theirs}.attn.qkv.bias"], 3)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases):
            arrays[f"{attention}/{name}/kernel"] = kernel.T.reshape(len(kernel), heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        out = state[f"{theirs}.attn.proj.weight"].T
        arrays[f"{attention}/out/kernel"] = out.reshape(heads, -1, out.shape[1])
        arrays[f"{attention}/out/bias"] = state[f"{theirs}.attn.proj.bias"]
        arrays |= _norm(f"{mine}/LayerNorm_0", state, f"{theirs}.norm1")
        arrays |= _norm(f"{mine}/LayerNorm_2", state, f"{theirs}.norm2")
        arrays |= _dense(f"{mine}/MlpBlock_3/Dense_0", state, f"{theirs}.mlp.fc1")
        arrays |= _dense(f"{mine}/MlpBlock_3/Dense_1", state, f"{theirs}.mlp.fc2")
    return arrays


def original_mixer_arrays(twin: TimmMixer) -> dict[str, np.ndarray]:
    """The weights of timm's twin under the names of the original Mixer release."""
    state = {name: value.numpy() for name, value in twin.state_dict().items()}
    arrays = {
        "stem/kernel": state["stem.proj.weight"].transpose(2, 3, 1, 0),
        "stem/bias": state["stem.proj.bias"],
        **_norm("pre_head_layer_norm", state, "norm"),
        **_dense("head", state, "head"),
    }
    for i in range(len(twin.blocks)):
        mine, theirs = f"MixerBlock_{i}", f"blocks.{i}"
        arrays |= _norm(f"{mine}/LayerNorm_0", state, f"{theirs}.norm1")
        arrays |= _norm(f"{mine}/LayerNorm_1", state, f"{theirs}.norm2")
        for mixing, mlp in (("token_mixing", "mlp_tokens"), ("channel_mixing", "mlp_channels")):
            arrays |= _dense(f"{mine}/{mixing}/Dense_0", state, f"{theirs}.{mlp}.fc1")
            arrays |= _dense(f"{mine}/{mixing}/Dense_1", state, f"{theirs}.{mlp}.fc2")
    return arrays


def _norm(name, state, source):
    return {f"{name}/scale": state[f"{source}.weight"], f"{name}/bias": state[f"{source}.bias"]}


def _dense(name, state, source):
    return {f"{name}/kernel": state[f"{source}.weight"].T, f"{name}/bias": state[f"{source}.bias"]}


def read_json(path):
    return json.loads(path.read_text())

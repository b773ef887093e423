"""A round as the official codes compute it: PyTorch and PEFT, client after client.

One model is wrapped once. For each client the adapter's state is loaded into it, an optimiser is
made, the steps are taken and the state is copied out; then the states are averaged. What those
codes do besides, writing clients' states to disk and reading them again, is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.rounds import (
    CLIP_NORM,
    LEARNING_RATE,
    SCALE,
    WEIGHT_DECAY,
    Case,
    Side,
    examples,
    parts,
    timed,
)
from fedlora_jax.models import Llama, ViT

try:
    import peft
    import torch
    import transformers
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "the round in PyTorch needs transformers and PEFT: pip install -e '.[parity]', "
        "or leave it out with --noreference"
    ) from error

State = dict[str, torch.Tensor]


def backbone(case: Case) -> Any:
    """transformers' model of a case, with random weights."""
    torch.manual_seed(0)
    model = case.model
    if isinstance(model, ViT):
        fields: dict[str, Any] = {
            "image_size": case.shape[0],
            "num_channels": case.shape[2],
            "patch_size": model.patch_size,
            "hidden_size": model.width,
            "num_hidden_layers": model.depth,
            "num_attention_heads": model.num_heads,
            "intermediate_size": model.mlp_dim or 4 * model.width,
            "layer_norm_eps": model.layer_norm_epsilon,
            "num_labels": model.num_classes,
        }
        return transformers.ViTForImageClassification(transformers.ViTConfig(**fields))
    assert isinstance(model, Llama)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if (scaling := model.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    fields = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.mlp_dim,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        "max_position_embeddings": model.context or 2048,
        "tie_word_embeddings": model.tied,
        "use_cache": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))


def wrapped(case: Case, model: Any) -> Any:
    """The model with fresh adapters, ready to be trained; what is trained is float32."""
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=round(SCALE * case.rank),
        lora_dropout=0.0,
        target_modules=list(case.torch_targets),
        modules_to_save=["classifier"] if case.head else None,
    )
    model = peft.get_peft_model(model.to(getattr(torch, case.compute)), config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def side(
    case: Case, clients: int, model: Any | None = None
) -> tuple[Side, Callable[[str], tuple[State, float]]]:
    """PyTorch's side, on the GPU if there is one.

    Args:
      case: What is computed.
      clients: K.
      model: From `wrapped`; by default with random weights and fresh adapters.

    Returns:
      The side, and the function behind it, which returns the averaged state and the mean loss.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (wrapped(case, backbone(case)) if model is None else model).to(device)
    arrays = {name: torch.from_numpy(x) for name, x in examples(case, clients).items()}
    if "image" in arrays:
        arrays["image"] = arrays["image"].permute(0, 3, 1, 2).contiguous()
    arrays = {name: x.long() if x.dtype == torch.int32 else x for name, x in arrays.items()}
    arrays = {name: x.to(device) for name, x in arrays.items()}
    positions = parts(case, clients)
    start = copied(model)

    def compute(_: str) -> tuple[State, float]:
        result = run_round(case, model, start, arrays, positions)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return timed({"parameters": parameters}, compute), compute


def run_round(
    case: Case,
    model: Any,
    start: State,
    arrays: Mapping[str, torch.Tensor],
    positions: Sequence[np.ndarray],
) -> tuple[State, float]:
    """One round of federated averaging.

    Args:
      case: What is computed.
      model: From `wrapped`; its state is overwritten.
      start: The global state of the adapters and the head.
      arrays: The examples of all clients.
      positions: Which of them each client has.

    Returns:
      The new global state, and the mean loss.
    """
    states, losses = [], []
    for mine in positions:
        peft.set_peft_model_state_dict(model, start)
        losses.append(train(case, model, arrays, torch.from_numpy(mine)))
        states.append(copied(model))
    sizes = torch.tensor([float(len(mine)) for mine in positions])
    return averaged(states, sizes / sizes.sum()), float(torch.stack(losses).mean())


def train(
    case: Case, model: Any, arrays: Mapping[str, torch.Tensor], mine: torch.Tensor
) -> torch.Tensor:
    """The local steps of one client, and their mean loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    total = torch.zeros((), device=next(iter(arrays.values())).device)
    for batch in mine[torch.randperm(len(mine))].split(case.batch_size):
        with torch.autocast(total.device.type, torch.bfloat16, case.compute == "bfloat16"):
            loss = loss_of(model, {name: x[batch] for name, x in arrays.items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        total += loss.detach()
    return total / case.steps


def loss_of(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the classes, or of each next token."""
    if "image" in batch:
        logits, labels = model(pixel_values=batch["image"]).logits, batch["label"]
    else:
        logits = model(input_ids=batch["tokens"][:, :-1]).logits.flatten(0, 1)
        labels = batch["tokens"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def copied(model: Any) -> State:
    """A copy of the state that a client sends."""
    return {name: x.clone() for name, x in peft.get_peft_model_state_dict(model).items()}


def averaged(states: Sequence[State], shares: torch.Tensor) -> State:
    """The mean of states, weighted."""
    return {
        name: sum(share * state[name] for share, state in zip(shares, states, strict=True))
        for name in states[0]
    }

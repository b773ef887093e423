"""Makes `peft_merges.npz`: weighted adapter merges by the real PEFT library.

    pip install -e '.[parity]'
    python tests/golden/make_peft_merges.py

Three adapters of unequal rank and alpha on a small model, merged by `add_weighted_adapter` with
weights that sum to one, by `svd` (our flexlora) and by `cat` (our flora). Everything is kept in
torch's layout, as PEFT has it.
"""

from pathlib import Path

import numpy as np
import peft
import torch

LAYERS = {"query": (24, 20), "up": (20, 40)}
ADAPTERS = {"one": (2, 4), "two": (4, 4), "three": (3, 12)}  # rank, alpha
WEIGHTS = [0.5, 0.2, 0.3]


class Model(torch.nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d_in, d_out) in LAYERS.items():
            setattr(self, name, torch.nn.Linear(d_in, d_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        return self.up(self.query(x))


def main() -> None:
    """Writes the file beside this script."""
    torch.manual_seed(0)
    model = None
    for name, (rank, alpha) in ADAPTERS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LAYERS))
        if model is None:
            model = peft.get_peft_model(Model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, value in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(value, std=0.5)
    arrays = {"weights": np.array(WEIGHTS), "peft": np.array(peft.__version__)}
    for merge in ("svd", "cat"):
        model.add_weighted_adapter(list(ADAPTERS), WEIGHTS, f"by_{merge}", merge)
    for layer in LAYERS:
        module = getattr(model.base_model.model, layer)
        for name in [*ADAPTERS, "by_svd", "by_cat"]:
            arrays[f"{layer}/{name}/lora_A"] = module.lora_A[name].weight.detach().numpy()
            arrays[f"{layer}/{name}/lora_B"] = module.lora_B[name].weight.detach().numpy()
            arrays[f"{layer}/{name}/scaling"] = np.array(module.scaling[name])
    np.savez_compressed(Path(__file__).with_name("peft_merges.npz"), **arrays)


if __name__ == "__main__":
    main()

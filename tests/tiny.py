"""The demo's data with a Vision Transformer whose rounds take a moment."""

from configs import digits


def tiny_digits(directory, arg=None):
    """Cohorts of four clients that take few steps; the backbone is kept in `directory`."""
    config = digits.get_config(arg)
    config.model.options.update(width=16, depth=1, num_heads=2)
    config.pretraining.options.steps = 20
    config.backbone_dir = str(directory / "backbones")
    config.clients_per_round = 4
    config.clients_per_chunk = "all"
    config.lora.targets = ("attention/query",)
    config.local.update(steps=2, batch_size=8)
    return config

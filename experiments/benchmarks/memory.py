"""What memory the compiler plans for a round of a language model."""

from typing import Any

from tabulate import tabulate

from experiments.benchmarks import programs

# Columns of the table of memory: how the loss is taken, and whether blocks are computed again.
LOSSES = {
    "whole": ("whole", False),
    "chunked": ("chunked", False),
    "chunked+remat": ("chunked", True),
}


def measure(row: str, *, blocks: int, rank: int) -> dict[str, Any]:
    """The memory of a round of `fedit`; a row is, for example, `4,128,chunked`."""
    clients, length, name = row.split(",", 2)
    loss, remat = LOSSES[name]
    planned = programs.working_bytes(
        "fedit",
        blocks=blocks,
        clients=int(clients),
        rank=rank,
        loss=loss,
        length=int(length),
        remat=remat,
        clients_per_chunk=None,
    )
    return {"working_bytes": planned}


def page(results: dict[str, Any]) -> str:
    """The table of memory, as Markdown."""
    facts, rounds = results["environment"], results["rounds"]
    names = [name for name in LOSSES if name in rounds[0]]
    per_token = 4e-9 * programs.BATCH_SIZE * programs.SMOLLM2["vocab_size"]
    table = [
        [
            line["clients"],
            line["length"],
            f"{line['clients'] * (line['length'] - 1) * per_token:.2f}",
            *(f"{line[name] / 1e9:.2f}" for name in names),
        ]
        for line in rounds
    ]
    headers = ["clients", "tokens", "logits, GB", *(f"{name}, GB" for name in names)]
    lines = [
        "# Memory of a language model's round",
        "",
        f"A round of `fedit` on the shapes of a SmolLM2-135M with {facts['blocks']} blocks, all "
        f"linear layers adapted at r = {facts['rank']}, clients side by side, batches of "
        f"{programs.BATCH_SIZE} texts, float32. {facts['date']}, {facts['device']}, jax "
        f"{facts['versions']['jax']}.",
        "",
        tabulate(table, headers, tablefmt="github", colalign=["right"] * len(headers)),
        "",
        "What a round needs besides its state and data, as the compiler plans it. `logits`: the "
        "size of one array of those of all clients' batches. `whole`: they are kept; `chunked`: "
        "those of 128 tokens at a time. `remat`: the blocks are computed again in the backward "
        "pass.",
    ]
    return "\n".join(lines)

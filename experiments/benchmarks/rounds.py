"""A round of ours beside one in PyTorch and PEFT: the same work, in processes that alternate.

Each side is a process of its own, because two libraries with threads of their own hinder each
other in one. A process prepares itself, says what it has prepared, and then times one round
whenever it is asked to; so the two take turns without compiling or loading anything again.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate

from fedlora_jax import aggregation, lora, methods, models
from fedlora_jax.data.clients import client_data
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, create, make_round, train_cohort
from fedlora_jax.federated.task import Task, causal_language_model, classification
from fedlora_jax.methods import Server, Trainable
from fedlora_jax.models import Llama, ViT

# Of both sides, in all cases.
SCALE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 2.0, 1e-3, 1e-5, 10.0
# What a chunk is called that holds the whole cohort.
ALL = "all"


class Case(NamedTuple):
    """A federation of which both sides compute a round.

    Attributes:
      title: What a table calls it.
      model: The backbone, a `ViT` or a `Llama`, with random weights.
      shape: Of an image, `[H, W, C]`, or of the tokens that the model reads, `[T]`.
      targets: The adapted layers, as patterns for `lora.init`.
      torch_targets: The same by their names in transformers 5.
      clients: K, all of which take part.
      batch_size: Examples a step.
      steps: Local steps; a client has one full batch of examples for each.
      rank: r.
      compute: Type of the arithmetic, and in which the frozen weights are stored. What is trained
        is float32 whatever it is.
      loop: Whether ours goes through the blocks in a loop.
    """

    title: str
    model: nn.Module
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    torch_targets: tuple[str, ...]
    clients: int
    batch_size: int
    steps: int
    rank: int
    compute: str = "float32"
    loop: bool = False

    @property
    def head(self) -> str | None:
        """The layer that is trained as a whole: a classifier's last."""
        return "^head$" if isinstance(self.model, ViT) else None

    @property
    def examples_per_client(self) -> int:
        """One epoch of full batches."""
        return self.batch_size * self.steps


_QKV = (("attention/(query|key|value)$",), ("q_proj", "k_proj", "v_proj"))
_LLAMA = (
    ("(attention|mlp)/",),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
CASES = {
    "digits": Case(
        "the demo's ViT, 16 px",
        models.get("vit_digits"),
        (16, 16, 1),
        ("attention/(query|value)$", "mlp/fc"),
        ("q_proj", "v_proj", "fc1", "fc2"),
        clients=18,
        batch_size=16,
        steps=8,
        rank=4,
    ),
    "vit_s16": Case(
        "ViT-S/16, 224 px",
        models.get("vit_s16", num_classes=100),
        (224, 224, 3),
        *_QKV,
        clients=5,
        batch_size=8,
        steps=2,
        rank=8,
    ),
    "llama_6": Case(
        "Llama, 6 layers of width 384, 128 tokens",
        Llama(vocab_size=8192, width=384, depth=6, num_heads=6, num_kv_heads=6, mlp_dim=1024),
        (128,),
        *_LLAMA,
        clients=5,
        batch_size=8,
        steps=2,
        rank=8,
    ),
    "smollm2_135m": Case(
        "SmolLM2-135M, 128 tokens",
        models.get("smollm2_135m"),
        (128,),
        *_LLAMA,
        clients=4,
        batch_size=4,
        steps=2,
        rank=8,
    ),
}
# Of accelerators: what fills one.
_LARGE = {
    "vit_s16_64": CASES["vit_s16"]._replace(clients=64),
    "smollm2_135m_32": CASES["smollm2_135m"]._replace(clients=32),
    "llama3_1b_16": CASES["smollm2_135m"]._replace(
        title="Llama-3.2-1B, 256 tokens",
        model=models.get("llama3_1b"),
        shape=(256,),
        clients=16,
    ),
}
CASES |= {
    name: case._replace(compute="bfloat16", loop=isinstance(case.model, Llama))
    for name, case in _LARGE.items()
}
# For the cost of a client: numbers of clients, and sizes of chunks.
COHORTS = {16: (ALL, "4"), 256: (ALL, "16", "64")}


def default_cases(platform: str) -> list[str]:
    """The names of the cases that are meant for a CPU, or for an accelerator."""
    return [name for name in CASES if (name in _LARGE) == (platform != "cpu")]


class Side(NamedTuple):
    """One side of the comparison, ready to be timed.

    Attributes:
      facts: `parameters`, how many a client trains; ours also `compile_s`, by size of chunk
        (None of a program that was compiled before and kept), and `matrix_rate`.
      seconds: From what is to be computed once to the seconds it took: PyTorch's side knows
        `round`, ours the sizes of chunks and `server`, the server's step alone.
    """

    facts: dict[str, Any]
    seconds: Callable[[str], float]


def examples(case: Case, clients: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random examples of all clients, client after client.

    Returns:
      `image` float32 `[M, H, W, C]` and `label` int32 `[M]`; or `tokens` int32 `[M, T + 1]`, the
      last of which is only predicted.
    """
    rng = np.random.default_rng(seed)
    count = clients * case.examples_per_client
    if isinstance(case.model, ViT):
        images = rng.standard_normal((count, *case.shape), dtype=np.float32)
        labels = rng.integers(case.model.num_classes, size=count, dtype=np.int32)
        return {"image": images, "label": labels}
    assert isinstance(case.model, Llama)
    size = (count, case.shape[0] + 1)
    return {"tokens": rng.integers(case.model.vocab_size, size=size, dtype=np.int32)}


def parts(case: Case, clients: int) -> list[np.ndarray]:
    """Which examples each client has."""
    return np.split(np.arange(clients * case.examples_per_client), clients)


def task(case: Case) -> Task:
    """What is learned: classes, or each next token."""
    model = case.model.clone(dtype=jnp.dtype(case.compute))
    if isinstance(model, ViT):
        learned = classification(model, lambda batch: (batch["image"],))
    else:
        learned = causal_language_model(model)
    return learned._replace(loop=case.loop)


def operations(case: Case) -> float:
    r"""Floating-point operations of a round's matrix products.

    A token takes 4 for each number of a frozen kernel, :math:`x W` and the gradient of x, 6 for
    each of an adapter, whose own gradient is taken too, and :math:`12\, T w` in each block for
    attention over T tokens of width w. What is computed twice to save memory counts once.
    """
    model, length = case.model, case.shape[0]
    if isinstance(model, ViT):
        length = (case.shape[0] // model.patch_size) ** 2 + 1
    shapes = lora.kernel_shapes(jax.eval_shape(lambda: initial_params(case, jax.random.key(0))))
    frozen = sum(shape.d_in * shape.d_out for shape in shapes.values())
    if isinstance(model, Llama) and model.tied:
        frozen += model.vocab_size * model.width
    adapted = (shapes[path] for path in lora.select(shapes, case.targets))
    trained = case.rank * sum(shape.d_in + shape.d_out for shape in adapted)
    tokens = case.clients * case.examples_per_client * length
    return tokens * (4.0 * frozen + 6.0 * trained + 12.0 * length * model.width * model.depth)


def matrix_rate(dtype: str) -> float:
    """Operations a second of large matrix products, one after the other; the best of several."""
    size, count = (2048, 2) if jax.default_backend() == "cpu" else (8192, 16)
    x, y = (jax.random.normal(jax.random.key(0), (2, size, size)) * size**-0.5).astype(dtype)
    products = jax.jit(lambda x, y: jax.lax.fori_loop(0, count, lambda _, y: x @ y, y))
    side = timed({}, lambda _: products(x, y).block_until_ready())
    return 2 * size**3 * count / min([side.seconds("") for _ in range(6)][1:])


def training(case: Case) -> LocalTraining:
    """AdamW behind a clipping of the norm, as `torch.optim.AdamW` computes it."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM), optax.adamw(1.0, weight_decay=WEIGHT_DECAY)
    )
    return LocalTraining(optimizer, case.batch_size, case.steps)


def initial_params(case: Case, key: jax.Array) -> lora.Params:
    """Random weights, stored in the type of the arithmetic."""
    kind = jnp.float32 if isinstance(case.model, ViT) else jnp.int32
    params = case.model.init(key, jnp.zeros((1, *case.shape), kind))["params"]
    return jax.tree.map(lambda x: x.astype(case.compute), params)


def server(case: Case, params: lora.Params, adapters: lora.Adapters) -> Server:
    """The server before the first round."""
    backbone, head = lora.split_head(params, case.head)
    return Server(backbone, Trainable(adapters, head), jnp.float32(SCALE), (), jnp.int32(0))


class Ours(NamedTuple):
    """Our side, and what is behind it.

    Attributes:
      side: To be timed.
      compute: From a size of a chunk, or `server`, to what a round, or the server's step, returns.
      text: From a size of a chunk to the compiled round.
    """

    side: Side
    compute: Callable[[str], Any]
    text: Callable[[str], str]


def ours(case: Case, clients: int, chunks: Sequence[str], initial: Server | None = None) -> Ours:
    """Our side: a round of `fedit`, compiled for each size of a chunk.

    Args:
      case: What is computed.
      clients: K.
      chunks: Numbers of clients trained side by side, as text, or `all`.
      initial: The server's state; by default with random weights and fresh adapters.
    """
    method, key = methods.get("fedit")(), jax.random.key(0)
    arrays = examples(case, clients)
    if "tokens" in arrays:
        arrays["answer"] = np.broadcast_to(
            np.arange(case.shape[0] + 1) > 0, arrays["tokens"].shape
        ).copy()
    data = client_data(arrays, parts(case, clients))

    @jax.jit
    def fresh(key: jax.Array) -> Server:
        params = initial_params(case, key)
        adapters = lora.init(key, params, targets=case.targets, rank=case.rank)
        return server(case, params, adapters)

    federation = create(key, method, fresh(key) if initial is None else initial, clients)
    cohort = jnp.arange(clients, dtype=jnp.int32)
    inputs = (federation, data, cohort, key, jnp.float32(LEARNING_RATE))
    programs, compile_s = {}, {}
    kept: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: kept.append(event))
    for chunk in chunks:
        kept.clear()
        start = time.perf_counter()
        size = None if chunk == ALL else int(chunk)
        function = make_round(Recipe(task(case), method, training(case), clients_per_chunk=size))
        programs[chunk] = function.lower(*inputs).compile()
        found = "/jax/compilation_cache/cache_hits" in kept
        compile_s[chunk] = None if found else time.perf_counter() - start

    def cohort_trained(*inputs: Any) -> Any:
        return train_cohort(Recipe(task(case), method, training(case)), *inputs).uploads

    uploads = jax.tree.map(
        lambda x: jax.random.normal(key, x.shape, x.dtype), jax.eval_shape(cohort_trained, *inputs)
    )
    shares = aggregation.shares(data.counts)
    aggregate = jax.jit(method.aggregate)

    def compute(what: str) -> Any:
        if what == "server":
            return jax.block_until_ready(aggregate(federation.server, uploads, shares))
        return jax.block_until_ready(programs[what](*inputs))

    facts = {
        "parameters": lora.count_parameters(federation.server.trainable),
        "compile_s": compile_s,
        "matrix_rate": matrix_rate(case.compute),
    }
    return Ours(timed(facts, compute), compute, lambda chunk: programs[chunk].as_text() or "")


def timed(facts: dict[str, Any], compute: Callable[[str], Any]) -> Side:
    """A side whose calls of `compute`, which waits for its results, are timed."""

    def seconds(what: str) -> float:
        start = time.perf_counter()
        compute(what)
        return time.perf_counter() - start

    return Side(facts, seconds)


def serve(side: str, case: str, clients: int, chunks: Sequence[str]) -> None:
    """Makes a side in this process and times what it reads from its input, line by line."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        if side == "torch":
            from experiments.benchmarks import peft_rounds

            made = peft_rounds.side(CASES[case], clients)[0]
        else:
            made = ours(CASES[case], clients, chunks).side
        print(json.dumps(made.facts), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(made.seconds(line.strip())), file=answers, flush=True)


@contextlib.contextmanager
def opened(command: Sequence[str]) -> Iterator[Side]:
    """A side in a process of its own, which runs `serve` and ends with the context.

    Raises:
      RuntimeError: If the process ends without an answer; it holds what that wrote.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def answer() -> Any:
            line = answers.readline()
            if not line:
                process.wait()
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)} failed:\n{log.read().strip()}")
            return json.loads(line)

        def seconds(what: str) -> float:
            with contextlib.suppress(BrokenPipeError):  # the answer will be missing, and say why
                requests.write(f"{what}\n")
                requests.flush()
            return answer()

        try:
            yield Side(answer(), seconds)
        finally:
            process.kill()


def sizes(chunks: Sequence[str]) -> list[str]:
    """Sizes of chunks without repetition, `all` first.

    Raises:
      ValueError: If one is neither a positive number nor `all`.
    """
    wrong = [chunk for chunk in chunks if chunk != ALL and not (chunk.isdecimal() and int(chunk))]
    if wrong:
        raise ValueError(f"--chunks={wrong[0]}: expected numbers of clients, or {ALL}")
    return list(dict.fromkeys([ALL, *chunks]))


def parts_of(case: Case, chunks: Sequence[str]) -> list[str]:
    """From `sizes`, without numbers that would hold the whole cohort."""
    return [chunk for chunk in chunks if chunk == ALL or int(chunk) < case.clients]


def measure(name: str, chunks: Sequence[str], repeats: int, reference: bool) -> dict[str, Any]:
    """Times one of `CASES`.

    Args:
      name: Which.
      chunks: From `sizes`; those that would hold the whole cohort are left out.
      repeats: Rounds of each size, and of PyTorch.
      reference: Whether to time PyTorch too.

    Returns:
      What `compare` does, with the case and its `summary`.
    """
    case = CASES[name]
    chunks = parts_of(case, chunks)
    with contextlib.ExitStack() as stack:

        def process(side: str) -> Side:
            return stack.enter_context(opened(_command(side, name, case.clients, chunks)))

        sides = {"ours": (process("ours"), [*chunks, "server"])}
        if reference:
            sides["torch"] = (process("torch"), ["round"])
        measured = compare(sides, repeats)
    described = case._asdict() | {"model": " ".join(repr(case.model).split())}
    return {"case": described, **measured, "summary": summary(case, measured)}


def measure_cohorts(repeats: int) -> dict[str, Any]:
    """Times our rounds of the demo's ViT by the size of the cohort, as `compare` returns them."""
    result = {}
    for clients, chunks in COHORTS.items():
        with opened(_command("ours", "digits", clients, chunks)) as side:
            result[str(clients)] = compare({"ours": (side, chunks)}, repeats)
    return result


def _command(side: str, case: str, clients: int, chunks: Sequence[str]) -> list[str]:
    """Runs `serve` in another process."""
    asked = {"side": side, "case": case, "clients": clients, "chunks": chunks}
    return [sys.executable, "-m", "experiments.benchmark", f"--worker=round:{json.dumps(asked)}"]


def compare(sides: Mapping[str, tuple[Side, Sequence[str]]], repeats: int) -> dict[str, Any]:
    """Times sides in turns, each with all that is wanted of it, after one turn of warming up.

    Args:
      sides: By name, each with what is to be timed.
      repeats: Turns.

    Returns:
      For each side its facts and, under `seconds`, the times of all turns by what was timed.

    Raises:
      ValueError: If the sides do not train the same number of parameters.
    """
    parameters = {name: side.facts["parameters"] for name, (side, _) in sides.items()}
    if len(set(parameters.values())) > 1:
        raise ValueError(f"the sides train different numbers of parameters: {parameters}")
    seconds: dict[str, dict[str, list[float]]] = {
        name: {what: [] for what in wanted} for name, (_, wanted) in sides.items()
    }
    for turn in range(1 + repeats):
        for name, (side, wanted) in sides.items():
            for what in wanted:
                spent = side.seconds(what)
                if turn:
                    seconds[name][what].append(spent)
    return {name: {**side.facts, "seconds": seconds[name]} for name, (side, _) in sides.items()}


def medians(measured: Mapping[str, Any]) -> dict[str, float]:
    """The median seconds of a side by what was timed."""
    return {what: statistics.median(times) for what, times in measured["seconds"].items()}


def summary(case: Case, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the table says of a case, from what `compare` returns."""
    ours_s = medians(measured["ours"])
    server_s = ours_s.pop("server")
    fastest = min(ours_s, key=lambda chunk: ours_s[chunk])
    compile_s = measured["ours"]["compile_s"]
    line = {
        "all_s": ours_s[ALL],
        "fastest": fastest,
        "fastest_s": ours_s[fastest],
        "compile_all_s": compile_s[ALL],
        "compile_fastest_s": compile_s[fastest],
        "server_s": server_s,
        "server_share": server_s / ours_s[fastest],
    }
    line["rate"] = operations(case) / line["fastest_s"]
    line["share_of_matrix_rate"] = line["rate"] / measured["ours"]["matrix_rate"]
    if "torch" in measured:
        torch_s = medians(measured["torch"])["round"]
        line |= {
            "torch_s": torch_s,
            "ratio_all": torch_s / ours_s[ALL],
            "ratio_fastest": torch_s / ours_s[fastest],
        }
    return line


def report(results: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    facts = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# A round, beside PyTorch and PEFT",
        "",
        f"{facts['date']}, {facts['device']}, {facts['cores']} cores, {versions}, load average "
        f"{facts['load_average_at_start']} when it began.",
    ]
    if results["cases"]:
        lines += ["", _table_of_cases(results), "", _NOTES]
    if results["per_client"]:
        lines += ["", _table_of_clients(results)]
    return "\n".join(lines)


_NOTES = (
    "Seconds are medians of a round; the sides took turns, each in a process of its own. `chunk`: "
    "how many clients the fastest round of ours trains side by side. `times faster`: PyTorch's "
    "round over ours, all clients at once and in the fastest chunks. `compile`: tracing and "
    "compiling of the same two, once for all rounds; `kept` if that was done before. `server`: the "
    "server's step alone, of the fastest round. `TFLOP/s`: operations of the matrix products of a "
    "round, none counted twice, over the time of the fastest; beside that, in per cent, what large "
    "products alone reach. Arithmetic is float32, or bfloat16 where it says so (frozen weights "
    "too, `torch.autocast`; what is trained is float32), with AdamW and gradients clipped by their "
    "norm; every client has one full batch for each step. PyTorch's side loads the adapter's state "
    "into one model, trains, and copies it out, client after client, then averages."
)


def _table_of_cases(results: Mapping[str, Any]) -> str:
    table = []
    for name, measured in results["cases"].items():
        line, case = measured["summary"], measured["case"]
        compared = "torch_s" in line
        table.append(
            [
                f"`{name}`: {case['title']}" + ", bfloat16" * (case["compute"] == "bfloat16"),
                case["clients"],
                f"{case['steps']} x {case['batch_size']}",
                f"{measured['ours']['parameters']:,}",
                f"{line['all_s']:.3g}",
                f"{line['fastest_s']:.3g}",
                line["fastest"],
                f"{line['torch_s']:.3g}" if compared else "",
                f"{line['ratio_all']:.2f}" if compared else "",
                f"{line['ratio_fastest']:.2f}" if compared else "",
                ", ".join(
                    "kept" if seconds is None else f"{seconds:.0f}"
                    for seconds in (line["compile_all_s"], line["compile_fastest_s"])
                ),
                f"{100 * line['server_share']:.2g}%",
                f"{line['rate'] / 1e12:.3g}",
                f"{100 * line['share_of_matrix_rate']:.0f}%",
            ]
        )
    headers = [
        "case",
        "K",
        "steps",
        "trained",
        "ours, all, s",
        "fastest, s",
        "chunk",
        "PyTorch, s",
        "times faster, all",
        "times faster, fastest",
        "compile, s",
        "server",
        "TFLOP/s",
        "of a matrix product's",
    ]
    return tabulate(
        table, headers, tablefmt="github", colalign=("left", *["right"] * 13), disable_numparse=True
    )


def _table_of_clients(results: Mapping[str, Any]) -> str:
    table = [
        [clients, chunk, f"{1e3 * seconds / int(clients):.3g}"]
        for clients, measured in results["per_client"].items()
        for chunk, seconds in medians(measured["ours"]).items()
    ]
    page = tabulate(
        table,
        ["K", "chunk", "ms a client"],
        tablefmt="github",
        colalign=["right"] * 3,
        disable_numparse=True,
    )
    return f"## The cost of a client\n\n`digits`, ours, by the size of the cohort.\n\n{page}"

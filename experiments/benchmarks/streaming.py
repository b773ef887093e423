"""Rounds on images that are read, decoded and placed while the round before is computed.

JPEG files are written once. A process then trains a federation on them that may hold less memory
than they take on disk, and much less than they would take decoded: Linux refuses it more
(`RLIMIT_DATA`, of all its private writable memory, that of XLA and of all threads included).
"""

import contextlib
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from PIL import Image
from tabulate import tabulate

from configs import image_folder
from fedlora_jax import experiment
from fedlora_jax.experiment import streaming
from fedlora_jax.experiment.program import Program
from fedlora_jax.experiment.setting import Setting
from fedlora_jax.experiment.state import first_state
from fedlora_jax.federated import cohort

SIDE, CLASSES = 224, 10
_QUALITY = 90
_SAMPLE = 512
# Shares of the images that are held in memory: to judge by, and to train the backbone on.
_HELD_OUT = {"validation": 0.0, "test": 0.004, "pretrain": 0.002}
_LEAST = 64
# Of the rate at which images are decoded, what devices take that stand in for others.
_PACES = (0.5, 0.8, 0.9, 1.0)
_PACED_ROUNDS = 12


class Size(NamedTuple):
    """How large the federation is.

    Attributes:
      clients: N.
      cohort: K.
      images: Of each client.
      rounds: How many, of which the first is left out of the share.
      memory: Bytes that the process may hold; 0 for no bound.
    """

    clients: int
    cohort: int
    images: int
    rounds: int
    memory: int


def write(folder: Path, count: int) -> int:
    """Writes JPEG files `folder/class/number.jpg`, those that are not there; returns their bytes.

    Coarse coloured patterns with fine noise: 22 kB each, as photographs of this size are.
    """
    total = 0
    for number in range(count):
        path = folder / str(number % CLASSES) / f"{number:07d}.jpg"
        if not path.exists():
            generator = np.random.default_rng(number)
            coarse = generator.integers(0, 256, (28, 28, 3), np.uint8)
            noise = generator.integers(-12, 13, (SIDE, SIDE, 1), np.int16)
            path.parent.mkdir(parents=True, exist_ok=True)
            smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path, quality=_QUALITY)
        total += path.stat().st_size
    return total


def fewest(clients: int) -> int:
    """How many images a federation needs: one for each client, besides those held out.

    A hash of the files says which those are, so that they may be more; hardly twice as many.
    """
    return clients + 2 * _LEAST * sum(share > 0 for share in _HELD_OUT.values())


def configuration(folder: Path, size: Size, images: int) -> ml_collections.ConfigDict:
    """A small ViT at 224 pixels; every client has as many images."""
    config = image_folder.get_config(f"root={folder},size={SIDE},clients={size.clients}")
    config.rounds, config.clients_per_round = size.rounds, size.cohort
    config.data.streaming = True
    config.data.held_out = {
        name: max(x, _LEAST / images * (x > 0)) for name, x in _HELD_OUT.items()
    }
    config.data.partition = "iid"
    config.data.partition_options = {"num_clients": size.clients}
    config.model.name = "vit_digits"
    shape = {"patch_size": 16, "width": 192, "depth": 6, "num_heads": 3}
    config.model.options = {"num_classes": CLASSES, **shape}
    config.pretraining.options.update(steps=1, batch_size=8)
    config.backbone_dir = str(folder.parent / "backbones")
    config.local.update(steps=1, batch_size=8)
    config.local.schedule = "constant"
    config.clients_per_chunk = "1"
    config.evaluation_batch_size = 32
    config.judged_clients = 1
    return config


def measure(folder: Path, workdir: Path, size: Size) -> dict[str, Any]:
    """Trains in this process, whose memory is bounded from here on.

    Args:
      folder: With the images.
      workdir: Of the run, which must be new.
      size: Of the federation.
    """
    paths = list(folder.rglob("*.jpg"))
    if size.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (size.memory, size.memory))
    config = configuration(folder, size, len(paths))
    setting = experiment.prepare(config)
    assert setting.stored is not None
    sample = np.arange(min(_SAMPLE, len(setting.train["label"])))[None]
    began = time.perf_counter()
    streaming.load_images(setting.stored.image, sample, np.ones(sample.shape, bool))
    rate = sample.size / (time.perf_counter() - began)
    program = experiment.compile_program(config, setting)
    rows = experiment.run(config, setting, program, workdir)
    seconds = [row["seconds"] for row in rows]
    waiting = [row["seconds_waiting"] for row in rows]
    visited = size.cohort * min(size.images, config.local.steps * config.local.batch_size)
    pauses = [visited / (pace * rate) for pace in _PACES]
    paced = [waited(config, setting, program, pause) for pause in pauses]
    return {
        **size._asdict(),
        "images_in_all": len(paths),
        "files_bytes": sum(path.stat().st_size for path in paths),
        "decoded_bytes": len(paths) * SIDE * SIDE * 3,
        "most_held_bytes": _most_held(),
        "images_a_round": visited,
        "decoded_a_second": rate,
        "seconds": seconds,
        "seconds_waiting": waiting,
        "share_waiting": sum(waiting[1:]) / sum(seconds[1:]),
        "device_of_training": jax.devices()[0].device_kind,
        "paces": dict(zip(map(str, _PACES), paced, strict=True)),
    }


def waited(
    config: ml_collections.ConfigDict, setting: Setting, program: Program, pause: float
) -> list[float]:
    """The share of each round but the first that is spent waiting for data.

    As in a run, but for the training: a pause stands in for a device of its own, which takes
    nothing from the cores that decode.

    Args:
      config: Of the run.
      setting: With the images in their files.
      program: Of the method.
      pause: Seconds that a round computes.
    """
    start, seed = first_state(config, setting, program.method), jax.random.key(config.seed)
    sizes = {"num_clients": len(start.data.counts), "cohort_size": start.cohort_size}
    members = [np.asarray(cohort.sample(seed, i, **sizes)) for i in range(_PACED_ROUNDS + 1)]
    shares = []
    stream = streaming.Stream(setting.stored, start, program, seed)
    with contextlib.closing(stream):
        for index in range(_PACED_ROUNDS):
            began = time.perf_counter()
            stream.data(index, members[index])
            stream.begin(index + 1, members[index + 1])
            time.sleep(pause)
            shares.append(stream.waited()["seconds_waiting"] / (time.perf_counter() - began))
    return shares[1:]


def _most_held() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def page(made: dict[str, Any], found: dict[str, Any]) -> str:
    """The results, and what they were made with, as a Markdown page."""
    per_round = [
        [index, f"{seconds:.2f}", f"{waiting:.3f}", f"{100 * waiting / seconds:.1f}%"]
        for index, (seconds, waiting) in enumerate(
            zip(found["seconds"], found["seconds_waiting"], strict=True)
        )
    ]
    headers = ["round", "seconds", "waiting for data", "share"]
    bound = f"{found['memory'] / 1e9:.1f} GB" if found["memory"] else "anything"
    files, decoded, held = (
        f"{found[name] / 1e9:.2f} GB"
        for name in ("files_bytes", "decoded_bytes", "most_held_bytes")
    )
    return f"""# Images that do not fit the memory

{found["clients"]} clients with {found["images"]} JPEG files each of 224 x 224 pixels,
{found["cohort"]} clients and {found["images_a_round"]} images a round.
{found["images_in_all"]} files of {files}, decoded {decoded}; the process might hold {bound}
(`RLIMIT_DATA`), and held {held} at most. Trained on {found["device_of_training"]};
{made["cores"]} cores, {made["date"]}, jax {made["versions"]["jax"]}, load average
{made["load_average_at_start"]} when it began.

Decoded alone: {found["decoded_a_second"]:.0f} images a second. After the first round, whose
images are read before it begins, the device waited {100 * found["share_waiting"]:.1f}% of the time.

{tabulate(per_round, headers=headers, tablefmt="github")}

Training takes a small part of that rate. A device beside the cores that decode would take more: a
pause stands for it here, as long as its round, in {_PACED_ROUNDS} rounds of the same images.

{tabulate(paced_rows(found), headers=_PACED_HEADERS, tablefmt="github")}
"""


_PACED_HEADERS = ["of the rate", "images a second", "waiting, median", "most"]


def paced_rows(found: dict[str, Any]) -> list[Sequence[str]]:
    """For each pace, how large a part of a round is waited."""
    return [
        [
            f"{float(pace):.0%}",
            f"{float(pace) * found['decoded_a_second']:.0f}",
            f"{np.median(shares):.1%}",
            f"{max(shares):.1%}",
        ]
        for pace, shares in found["paces"].items()
    ]

"""Whose the training examples are: drawn as `config.data` says, kept in a file, and looked over.

`partition.json` in a run's work directory holds

* `format`: the version of this format, 1;
* `data`: full name and split of the data set, its number of examples, and a digest of all that
  partitioners look at, and of its text;
* `partitioner`, `options`, `seed`: what made it;
* `sha256`: of the parts, written as JSON without spaces;
* `parts`: for each client, the positions of its examples.
"""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from fedlora_jax.data import partition
from fedlora_jax.experiment import records
from fedlora_jax.experiment.setting import Setting, full_name, is_labelled

PARTITION = "partition.json"

Examples = dict[str, np.ndarray]


class Partition(NamedTuple):
    """Whose the training examples are, and what made it so.

    Attributes:
      origin: Data, partitioner, options and seed, as the file has them.
      parts: For each client, the positions of its examples.
    """

    origin: dict[str, Any]
    parts: partition.Parts


class Overview(NamedTuple):
    """What the clients of a partition have.

    Attributes:
      counts: The number of examples of each client, domain and label, `[N, D, L]`; without labels
        L is 1.
      whole: The same of all training examples, whether or not a client has them, `[D, L]`.
      domains: Names of the domains.
    """

    counts: np.ndarray
    whole: np.ndarray
    domains: tuple[str, ...]

    @property
    def kind(self) -> str:
        """By what clients are compared: label, or domain where there are no labels."""
        return "label" if self.counts.shape[2] > 1 else "domain"

    @property
    def by_kind(self) -> np.ndarray:
        """Examples by client and kind, `[N, L]` or `[N, D]`."""
        return self.counts.sum(1) if self.kind == "label" else self.counts[:, :, 0]

    @property
    def whole_by_kind(self) -> np.ndarray:
        """All training examples by kind, `[L]` or `[D]`."""
        return self.whole.sum(0) if self.kind == "label" else self.whole[:, 0]


def draw(config: ml_collections.ConfigDict, train: Examples, seed: int) -> partition.Parts:
    """The positions of each client's training examples, as `config.data` says.

    Args:
      config: Its `data.partition` and `data.partition_options`.
      train: Training examples of all clients, dict of arrays `[M, ...]`.
      seed: The same seed gives the same parts.

    Raises:
      ValueError: If the data set lacks what the partitioner splits by, or as that.
    """
    name, options = config.data.partition, config.data.partition_options
    partition.check_options(name, options)
    split = partition.get(name)
    known = {**_looked_at(train), "seed": seed}
    parameters = inspect.signature(split).parameters
    # Of files of one's own.
    mending = {"clients": ": name each example's in its file, or give the configuration clients=N"}
    for each in ("labels", "clients"):
        if each not in known and each in parameters and parameters[each].default is not None:
            hint = mending.get(each, "") if "files" in config.data else ""
            raise ValueError(
                f"the partition {name!r} needs {each}, which the data set {config.data.name!r} "
                f"does not have{hint}"
            )
    wanted = {each: known[each] for each in parameters if each in known}
    return split(**wanted, **options)


def of_run(config: ml_collections.ConfigDict, train: Examples, workdir: Path) -> Partition:
    """The partition in a work directory, or one drawn from `config.seed` if there is none.

    Raises:
      ValueError: If there is one of other data, options or another seed, or it was changed.
      Damaged: If it is gone, and rounds of the run are finished.
    """
    path, origin = workdir / PARTITION, _origin(config, train)
    records.check_not_gone(path)
    if not path.exists():
        return Partition(origin, draw(config, train, config.seed))
    content = partition.load(path)
    if not isinstance(content, dict) or "parts" not in content:
        raise ValueError(
            f"{path} is not a partition that a run has written. To use it, move it elsewhere and "
            "set config.data.partition to 'file' and config.data.partition_options.path to it"
        )
    changed = records.differences(origin, {name: content.get(name) for name in origin}, "")
    parts = partition.parts_of(content, path, origin["data"]["num_examples"]) if not changed else []
    if not changed and _file_changed(config, train, parts):
        changed = [f"the content of {config.data.partition_options.path} is another"]
    if changed:
        raise ValueError(
            f"{path} holds another partition ({'; '.join(changed)}). Choose another work "
            "directory, or remove this one; or go back to the data, options and seed of then"
        )
    return Partition(origin, parts)


def write(found: Partition, workdir: Path) -> Path:
    """Writes `partition.json` unless it is there; returns its path."""
    path = workdir / PARTITION
    if not path.exists():
        head = {
            "format": partition.FORMAT,
            **found.origin,
            "sha256": partition.digest_of_parts(found.parts),
        }
        lines = [json.dumps(part.tolist(), separators=(",", ":")) for part in found.parts]
        text = json.dumps(head, indent=2).removesuffix("\n}")
        records.write_atomically(path, text + ',\n  "parts": [\n' + ",\n".join(lines) + "\n]}\n")
    return path


def overview(train: Examples, domains: tuple[str, ...], parts: partition.Parts) -> Overview:
    """Counts what the clients of a partition have.

    Args:
      train: Training examples of all clients, dict of arrays `[M, ...]`.
      domains: Names of the domains.
      parts: For each client, the positions of its examples.
    """
    of_domain = train["domain"]
    of_label = train["label"] if is_labelled(train) else np.zeros_like(of_domain)
    num_labels = int(of_label.max()) + 1
    of_pair = of_domain.astype(np.int64) * num_labels + of_label
    size, shape = len(domains) * num_labels, (len(domains), num_labels)
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    counts = np.bincount(
        owners * size + of_pair[np.concatenate(parts)], minlength=len(parts) * size
    )
    whole = np.bincount(of_pair, minlength=size)
    return Overview(counts.reshape(-1, *shape), whole.reshape(shape), domains)


def partition_counts(config: ml_collections.ConfigDict, setting: Setting) -> np.ndarray:
    """How many examples each client has of each domain and label, `[N, D, L]`."""
    parts = draw(config, setting.train, config.seed)
    return overview(setting.train, setting.domains, parts).counts


def _looked_at(train: Examples) -> dict[str, Any]:
    """What partitioners look at, and text, by which other data are told."""
    found = {"num_examples": len(train["domain"]), "domains": train["domain"]}
    if is_labelled(train):
        found["labels"] = train["label"]
    if "client" in train:
        found["clients"] = train["client"]
    if "tokens" in train:
        found["tokens"] = train["tokens"]
    return found


def _origin(config: ml_collections.ConfigDict, train: Examples) -> dict[str, Any]:
    data = config.data
    looked_at = _looked_at(train)
    origin = {
        "data": {
            "name": full_name(config),
            "split": data.splits.train,
            "num_examples": looked_at["num_examples"],
            "digest": partition.digest(**looked_at),
        },
        "partitioner": data.partition,
        "options": data.partition_options.to_dict(),
        "seed": config.seed,
    }
    return json.loads(json.dumps(origin, default=list))


def _file_changed(
    config: ml_collections.ConfigDict, train: Examples, parts: partition.Parts
) -> bool:
    """Whether the file that a partition was read from is still there, and holds another."""
    if config.data.partition != "file":
        return False
    if not Path(config.data.partition_options.path).expanduser().exists():
        return False
    now = draw(config, train, config.seed)
    return partition.digest_of_parts(now) != partition.digest_of_parts(parts)

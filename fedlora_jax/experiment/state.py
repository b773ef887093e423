"""What a run begins with: server, clients and their data, and on which devices they are."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from fedlora_jax import blocks, lora
from fedlora_jax.data.clients import ClientData, client_data
from fedlora_jax.data.partition import Parts
from fedlora_jax.experiment import partitions
from fedlora_jax.experiment.setting import Setting, check_cohort, dtype_of, is_labelled
from fedlora_jax.federated import placement, randomness, ranks
from fedlora_jax.federated.evaluation import HeldOut, Owned, held_out
from fedlora_jax.federated.round import Federation, PyTree, check_ranks, first_states
from fedlora_jax.methods import Method, Server, Trainable


class State(NamedTuple):
    """A federation before its first round, with its data on the device.

    Attributes:
      server: The server's state.
      client: The state that each client begins with, on the host.
      ranks: The rank that each client can afford, int32 `[N]`.
      data: The data of all clients.
      test: What is held out.
      cohort_size: K.
    """

    server: Server
    client: PyTree
    ranks: jax.Array
    data: ClientData
    test: HeldOut
    cohort_size: int

    @property
    def federation(self) -> Federation:
        """All of it on the device, the states of all N clients too."""
        count = len(self.ranks)
        clients = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], count, 0), self.client)
        return _tied(Federation(self.server, clients, self.ranks))

    def outlined(self) -> "State":
        """The same with shapes in the place of the server's arrays, which it does not hold."""
        return self._replace(server=jax.eval_shape(lambda server: server, self.server))


def first_state(
    config: ml_collections.ConfigDict,
    setting: Setting,
    method: Method,
    parts: Parts | None = None,
    mesh: Mesh | None = None,
) -> State:
    """Splits the data over clients and makes the first adapters, both from `config.seed`.

    Args:
      config: As in `configs/`.
      setting: From `prepare`.
      method: What is run.
      parts: The positions of each client's examples; by default drawn.
      mesh: The devices that all is put on; None for one.

    Raises:
      ValueError: If a round wants more clients than there are, there are not as many ranks as
        clients, or as `lora.init`.
    """
    seed = jax.random.key(config.seed)
    parts = partitions.draw(config, setting.train, config.seed) if parts is None else parts
    if method.pooled:
        parts = [np.concatenate(parts)]
    else:
        check_cohort(config, len(parts))
    # Several devices may each hold a part alone, and are given it from the host.
    params = jax.device_put(setting.params) if mesh is None else setting.params
    backbone, head = lora.split_head(params, config.lora.head or None)
    adapters = lora.init(
        randomness.stream(seed, "adapters"),
        backbone,
        targets=config.lora.targets,
        rank=config.lora.rank,
    )
    if setting.task.loop:
        try:
            blocks.check(backbone, adapters)
        except ValueError as error:
            raise ValueError(f"config.model.loop=True is impossible here: {error}") from error
    server = Server(
        backbone,
        Trainable(adapters, head),
        scale=jnp.float32(config.lora.scale),
        memory=(),
        round=jnp.int32(0),
    )
    chosen = None
    if not method.pooled:
        chosen = ranks.assign(config.lora.ranks, config.lora.rank, len(parts), config.seed)
    affordable = check_ranks(method, server, len(parts), chosen)
    key, dtype = randomness.stream(seed, "method"), dtype_of(config.precision.compute)
    server, client = first_states(key, method, server, dtype)
    data = client_data(setting.train, parts)
    test = _held_out(config, setting, parts, method.personal is not None)
    return State(
        _placed_server(server, mesh),
        jax.tree.map(np.asarray, client),
        everywhere(affordable, mesh),
        everywhere(data, mesh),
        _placed_test(test, mesh),
        1 if method.pooled else config.clients_per_round,
    )


def everywhere(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays on every device of a mesh."""
    return tree if mesh is None else placement.put(tree, placement.everywhere(mesh))


def rows(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays of the clients of a cohort, spread over a mesh; of several hosts each has its own."""
    return jax.tree.map(jnp.asarray, tree) if mesh is None else placement.put_own_rows(tree, mesh)


def _placed_server(server: Server, mesh: Mesh | None) -> Server:
    if mesh is not None:
        return placement.put(server, placement.server(mesh, server))
    return _tied(server)


def _tied(tree: PyTree) -> PyTree:
    """Arrays that are where they are for good.

    What is read from a file is tied to a device, what is new is not, and a round's results are if
    any input was: all tied from the start, a round compiles once, also after a restart.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


def _held_out(
    config: ml_collections.ConfigDict,
    setting: Setting,
    parts: Sequence[np.ndarray],
    personal_models: bool,
) -> HeldOut:
    """Each client's own text where there is such; else examples of its domains and labels."""
    natural = config.data.partition == "natural"
    train, test = setting.train, setting.test
    kind = "client" if natural else "label" if is_labelled(train) else "domain"
    order = np.concatenate(parts)
    return held_out(
        test,
        test["domain"],
        test[kind],
        Owned(np.array([len(part) for part in parts]), train["domain"][order], train[kind][order]),
        seed=jax.random.key(config.seed),
        judged_clients=config.judged_clients,
        kinds_are_own=natural,
        personal_models=personal_models,
    )


def _placed_test(test: HeldOut, mesh: Mesh | None) -> HeldOut:
    """What the device needs of it; who counts how much stays on the host."""
    examples, cells, domains = everywhere((test.examples, test.cells, test.domains), mesh)
    panel = test.panel._replace(
        examples=everywhere(test.panel.examples, mesh), shares=everywhere(test.panel.shares, mesh)
    )
    return test._replace(examples=examples, cells=cells, domains=domains, panel=panel)

"""What the transforms share: a memory of their own at the server."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fedlora_jax.methods import Method, Server
from fedlora_jax.methods._base import PyTree


class Memory(NamedTuple):
    """The memory of the method within, and that of the transform around it."""

    inner: PyTree
    own: PyTree


def inner(server: Server) -> Server:
    """The server as the method within knows it."""
    return server._replace(memory=server.memory.inner)


def outer(server: Server, own: PyTree) -> Server:
    """The server with the transform's memory around that of the method within."""
    return server._replace(memory=Memory(server.memory, own))


def around(method: Method, **functions: Any) -> Method:
    """The method behind a server with a memory of the transform's own, with `functions` replaced.

    Functions that are not replaced see the server as before.
    """

    def below(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if function is None:
            return None
        return lambda server, *rest: function(inner(server), *rest)

    passed_on = (
        *("start", "finish", "received", "missed", "outdated"),
        *("unmoved", "penalty", "personal"),
    )
    kept = {name: below(getattr(method, name)) for name in passed_on}
    return method._replace(**{**kept, **functions})

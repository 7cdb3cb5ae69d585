"""The kinds of rails: a line for each, in the order of `RailKind`, the best one first."""

from __future__ import annotations

from collections.abc import Callable

from adaptra_plugin.transport.proxy.rails.rdma.setup import RdmaFactory
from adaptra_plugin.transport.proxy.rails.setup import RailFactory
from adaptra_plugin.transport.proxy.rails.sockets import ShmFactory, TcpFactory

FACTORIES: tuple[Callable[[], RailFactory], ...] = (ShmFactory, RdmaFactory, TcpFactory)

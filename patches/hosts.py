"""The hosts: to add one, write a module with a `Host`, and add a line here. Neither torch nor a host is imported."""

from adaptra_plugin.host import HOSTS, register
from adaptra_plugin.patches.deepspeed_host import DeepSpeed
from adaptra_plugin.patches.megatron_host import Megatron

__all__ = ["HOSTS"]

register(DeepSpeed())
register(Megatron())

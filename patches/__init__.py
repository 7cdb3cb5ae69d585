"""Per host: what it brings, the gate, the adapter; the patch registry."""

from adaptra_plugin.patches import hosts as hosts  # whatever is imported from here, the hosts are known

"""The ways frames travel: TCP, shared memory, RDMA."""

"""Rails over RDMA. Optional: without pyverbs, or without ports, the factory says why there are none."""

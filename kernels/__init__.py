"""Triton kernels and their launchers. They know tensors and grids, nothing of fastppo: `fastppo.ops` calls them."""

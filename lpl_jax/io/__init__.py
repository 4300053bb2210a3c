"""Files: atomic writes, tensors, weights of other projects, the hub."""

"""Files: written whole, read with their digests checked; directories of weights, checkpoints of runs."""

"""What keeps a run safe: checkpoints, log, lock, and a stop that is asked for."""

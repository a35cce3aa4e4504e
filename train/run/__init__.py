"""What a run needs beside its steps: checkpoints, log, lock, signals to stop, rates, a profile."""

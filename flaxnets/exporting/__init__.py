"""Writes nets as files for other programs: StableHLO for JAX, ONNX for other runtimes."""

"""Nets as files that other programs run: StableHLO for JAX, ONNX for the rest."""

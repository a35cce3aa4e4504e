"""Weights in and out: PyTorch checkpoints to directories that `flaxnets.load` opens, and back.

`python -m convert --help` is the command; `convert.conversion` holds the same as functions.
"""

"""Weights in and out: PyTorch checkpoints to directories that `flaxnets.load` opens, and back.

`python -m convert --help` is the command. The same as functions: `convert.conversion` opens weights of any
kind, `convert.arithmetic` works on them, `convert.writing` writes them.
"""

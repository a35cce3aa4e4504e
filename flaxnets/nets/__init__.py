"""The nets: convolutions, layers, blocks, and the residual net made of them, in Flax linen."""

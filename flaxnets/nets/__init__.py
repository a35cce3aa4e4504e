"""The nets: convolutions, layers, blocks, and the residual net made of them. Flax linen stays here."""

"""Data: where images come from, in which order, and how they are cropped and augmented on the host."""

"""Stores weights and checkpoints. Files are written whole or not at all; reading checks their digests."""

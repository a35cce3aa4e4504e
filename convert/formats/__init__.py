"""File formats: bytes to named arrays and back."""

"""Names: from what a file holds to the tensors of one net under their canonical names."""

"""Tools beside training: plans for TPUs, descriptions of a run, export of its weights."""

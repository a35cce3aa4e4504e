"""Evaluation: accuracy over a data set, published test sets, mistakes, probes of features, and pictures."""

"""Evaluation: accuracy over a data set, its report and its pictures."""

"""Applies nets to many images: classes, features, neighbours, explanations. Also draws a net's diagram."""

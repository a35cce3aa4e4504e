"""Nets in use: classes, features, neighbours and explanations of many images, and the diagram of a net."""

"""Weights as a repository of the Hugging Face hub: a folder that timm and flaxnets open, and its upload."""

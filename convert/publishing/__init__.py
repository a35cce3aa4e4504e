"""`flaxnets push`: weights as a folder that timm and flaxnets open, and its upload to Hugging Face."""

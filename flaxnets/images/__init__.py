"""Images: what weights expect of them, and how a file becomes the input of a net."""

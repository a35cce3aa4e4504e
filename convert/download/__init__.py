"""Downloads: published files and repositories of the Hugging Face hub."""

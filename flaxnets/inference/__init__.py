"""What is done with a net and many images: classes, features, neighbours, and what it looks at."""

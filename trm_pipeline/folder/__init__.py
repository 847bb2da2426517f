"""A user's own images and one file of labels."""

"""TRM-ML and its peers, as a training loop takes them."""

"""What the example scripts share: data, the embedded model, token caches, methods, training and reports."""

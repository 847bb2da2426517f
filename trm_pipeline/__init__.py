"""What runs: data, frozen models, methods, training and reports. It imports ``trm_losses``, never the other way round."""

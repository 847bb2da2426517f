"""What a frozen model gives of images: cached, or made as it is asked for."""

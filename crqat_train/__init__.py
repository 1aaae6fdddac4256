"""Images in, trained and quantized checkpoint out. Needs torch."""

"""From images to a trained, quantized checkpoint. Needs torch."""

"""Post-training quantization beyond calibration: equalization, adaptive rounding, bias correction. Needs no labels."""

"""Post-training quantization beyond calibration: equalization, adaptive rounding, bias correction. No labels needed."""

"""A graph with QuantizeLinear and DequantizeLinear, and the rules it keeps."""

"""Trains the float network, and from it the quantized student and its teacher."""

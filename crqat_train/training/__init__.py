"""From a float network to the trained student and teacher."""

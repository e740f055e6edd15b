"""Files of weights, and folders that hold them."""

"""Pure tensor functions: no parameters, and no state but which process this is (``ranks``)."""

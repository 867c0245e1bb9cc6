"""Scripts to copy, each by itself; the paper's experiments are in ``examples.protocol``."""

"""Scripts to copy, each complete in one file. The paper's experiments are in ``examples.protocol``."""

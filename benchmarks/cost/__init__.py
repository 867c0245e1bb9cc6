"""What does long-range attention cost? FLOPs, saved bytes and kernels, counted and not measured."""

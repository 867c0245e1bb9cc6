"""Volumes: read, drawn, brought to one orientation, cut into slices and split into folds."""

"""Scores, comparisons and tables."""

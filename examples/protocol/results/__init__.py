"""What runs are judged by: scores, comparisons and tables."""

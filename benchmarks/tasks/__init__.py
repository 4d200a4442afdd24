"""Tasks with ground truth for measuring what compression costs."""

"""Files and folders of checkpoints, and averages of weights."""

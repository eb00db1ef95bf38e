"""One rank's part of a run, without Lightning."""

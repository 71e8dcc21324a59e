"""Whether a model is any good, and who says so."""

"""The model: backbone, head, small network, novelty, activation maps."""

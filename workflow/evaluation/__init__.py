"""Evaluate a model: cross-validation, metrics, comparison with the champion, gate, and report."""

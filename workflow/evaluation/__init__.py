"""Evaluate a model: cross-validation, metrics, comparison with the champion, promotion gate, and report."""

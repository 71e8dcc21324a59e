"""Serve a registered model: on a page, and exported for phones."""

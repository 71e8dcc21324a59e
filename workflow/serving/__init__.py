"""Serve a registered model: on a web page, or exported for phones."""

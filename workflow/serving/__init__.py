"""Use a registered model: load it, serve it over HTTP, classify many files with it, or export it for phones."""

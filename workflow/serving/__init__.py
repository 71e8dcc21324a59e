"""Use a registered model: load it, try it on a web page, or export it for phones."""

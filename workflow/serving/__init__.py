"""How a registered model gets into people's hands: by a command, on a page, on a phone."""

"""From a source of photos to data sets."""

"""Turn a source of photos into datasets."""

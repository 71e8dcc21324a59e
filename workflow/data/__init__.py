"""Turn a source of images into datasets."""

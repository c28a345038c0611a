"""Data: sources of images, the order of records in training, and conversion between pixels and model values."""

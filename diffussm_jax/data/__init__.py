"""Data: sources of images, the order in which training reads them, and the way between pixels and model values."""

"""Search of images by a text or an image."""

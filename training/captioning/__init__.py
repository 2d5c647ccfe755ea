"""Captioning data sets: sources, decoding, choice and filter of captions, output, engines."""

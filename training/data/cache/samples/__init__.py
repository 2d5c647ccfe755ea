"""Conversations of a cache: the images that they show, each once; a table of the samples beside them; their tokens."""

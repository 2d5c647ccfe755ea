"""Rewards of completions, for `blipren grpo`.

A reward is a function with TRL's signature: it takes lists as keywords, one item a completion, and returns a list of
numbers, None where it does not apply. Every reward gets `prompts` (None for a caption), `completions` (texts),
`completion_ids`, `references` (the data's captions or answers), `image_ids`, `facts` (what the data set's metadata says
of the image), and `ended` (whether the completion ended by itself).
"""

"""The drawn worlds of `blipren quickstart --world NAME`, one file each."""

"""Writing a cache: units of rows, what is taken out as duplicates, the finished folder."""

"""Where a cache is embedded: on this machine or on a Ray cluster."""

"""Everything that makes, feeds, trains, judges and publishes a BLIPren model. The model itself never imports it."""

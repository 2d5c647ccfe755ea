"""BLIPren as a model of lmms-eval, the harness of published benchmarks."""

from tests.stages.conftest import bases, cache_dir, dataset_dir, deterministic_model, model_dir, settings  # noqa: F401

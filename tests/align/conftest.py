from tests.stages.align.conftest import bases, cache, scenes, settings, untrained  # noqa: F401

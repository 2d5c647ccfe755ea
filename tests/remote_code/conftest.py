"""The loopback Hub, from which a process without our package loads a checkpoint."""

from tests.hub.conftest import hub  # noqa: F401

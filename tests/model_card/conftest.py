"""The loopback Hub, for the test of a card by the Hub's own client."""

from tests.hub.conftest import hub  # noqa: F401

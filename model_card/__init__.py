"""Model card template and builder."""

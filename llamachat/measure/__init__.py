"""Proof and measurement: perplexity, and what this machine runs with."""

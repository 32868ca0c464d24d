"""Checkpoint conversion and verification for Flamingo-family models."""

__version__ = "0.1.0"

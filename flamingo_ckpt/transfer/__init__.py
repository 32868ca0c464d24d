"""Releases to the hub and from it: whole folders, checked file by file."""

"""The module trees of a Flamingo, as torch modules.

Importing a module of this package imports torch, so the rest of the package does it inside
functions only.
"""

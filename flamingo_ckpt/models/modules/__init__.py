"""The module trees of a Flamingo, as torch modules.

Importing a module of this package imports torch, so the rest of the package does it inside
functions only.
"""

from flamingo_ckpt.models.torchvision_compat import import_torchvision

# transformers imports torchvision wherever it finds it, and fails where that fails.
try:
    import_torchvision()
except ImportError:
    pass  # not installed: then transformers does without

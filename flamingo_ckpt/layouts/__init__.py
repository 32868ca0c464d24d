"""Key spaces: what names mean and how one naming maps to another. No files, no torch.

Here now: the prefixes that training wrappers add. Layout tables and the maps between them live
beside it.
"""

from flamingo_ckpt.layouts.prefixes import strip_wrappers as strip_wrappers

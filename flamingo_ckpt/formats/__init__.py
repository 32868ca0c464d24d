"""Bytes on disk to manifests and back; no torch, no knowledge of what the names mean.

`open_checkpoint` reads any format. Writers (`torch_writer`, `safetensors`, `npz`) lay out a file
before a byte is written; `staging` puts it in place atomically.
"""

from flamingo_ckpt.formats.opening import open_checkpoint as open_checkpoint

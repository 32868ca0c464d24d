"""The grid of a file's image positions, where a config says it and no number of rows does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.position_tables import Grid, PositionTable
from flamingo_ckpt.models.config import ModelConfig, read_json
from flamingo_ckpt.tensors import Manifest

if TYPE_CHECKING:
    from flamingo_ckpt.loading.match import Load

#: open_clip's first: a folder with both has it for the weights under open_clip's names.
_CONFIG_NAMES: Final = ("open_clip_config.json", "config.json")


def file_grid(
    manifest: Manifest,
    config: ModelConfig | None,
    loads: Sequence[Load],
    tables: Mapping[str, PositionTable],
) -> Grid | None:
    """(height, width) of the file's image positions as a config has it; None for no word.

    Asked are `config` and, where a folder was opened, the config in it. A grid counts only if it
    has as many cells as the file has positions: a config may be of another model.

    Args:
        manifest: of the file.
        config: of the model, as the caller gave it.
        loads: what is loaded into what.
        tables: of the module, by name.
    """
    counts = {
        load.step.shape[-2] - tables[name].num_prefix
        for load in loads
        for name in load.target.names
        if name in tables and tables[name].kind == "image" and len(load.step.shape) in (2, 3)
    }
    if not counts:
        return None
    for told in _configs(manifest, config):
        grid = grid_from_config(told)
        if grid is not None and counts == {grid[0] * grid[1]}:
            return grid
    return None


def _configs(manifest: Manifest, config: ModelConfig | None) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = [] if config is None else [config.data]
    for name in _CONFIG_NAMES if manifest.folder else ():
        path = os.path.join(str(manifest.folder), name)
        if os.path.isfile(path):
            try:
                document = read_json(path)
            except CkptError:
                continue  # nothing was asked of it
            if isinstance(document, Mapping):
                found.append(document)
    return found


def grid_from_config(config: Mapping[str, Any]) -> Grid | None:
    """The grid of patches that a `config.json` or `open_clip_config.json` tells, None for none.

    Read are `image_size` and `patch_size` of `vision_config` (transformers), of
    `model_cfg.vision_cfg` (open_clip) or of the configuration itself.
    """
    inner = config.get("model_cfg", config)
    for name in ("vision_config", "vision_cfg"):
        if isinstance(inner, Mapping) and isinstance(inner.get(name), Mapping):
            inner = inner[name]
    if not isinstance(inner, Mapping):
        return None
    pixels, patch = (_sizes(inner.get(name)) for name in ("image_size", "patch_size"))
    if pixels is None or patch is None:
        return None
    grid = pixels[0] // patch[0], pixels[1] // patch[1]
    return grid if min(grid) > 0 else None


def _sizes(size: Any) -> Grid | None:
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return None
    height, width = pair
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair)
    return (height, width) if whole else None

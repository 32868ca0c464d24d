"""Picture files: decoded or refused, and prepared as the folders around a model say."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flamingo_ckpt.parity.preprocess import open_picture, prepare
from tests.loading.flamingo_files import refused
from tests.support import FIXTURES
from tests.zoo_clip import IMAGE

RED = FIXTURES / "red-ball.png"


# --- files ---------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """The head of a picture of any size, which is all that a bomb needs."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    packed = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + packed


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "UnidentifiedImageError"),
        ("text.png", b"hello", "UnidentifiedImageError"),
        ("truncated.png", RED.read_bytes()[:200], "OSError"),
        ("bomb.png", png(60_000, 60_000), "DecompressionBombError"),
        ("large.png", png(10_000, 10_000), "DecompressionBombWarning"),
        ("narrow.png", png(5, 5_000), "too narrow"),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "Unidentified"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = refused("FC484", open_picture, str(path))
    assert words in error.message
    assert error.where == str(path)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    for name in ("red\x1b[31m.png", "a\nb.png", "nul\0.png"):
        assert name not in refused("FC484", open_picture, name).message
    path = tmp_path / "red\x1b[31m.png"
    path.write_bytes(b"no picture")
    assert "\x1b" not in refused("FC484", open_picture, str(path)).message


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    with Image.open(RED) as red:
        grey = red.convert("L")
        changed = grey.convert("I;16") if mode == "I;16" else red.convert("RGB").convert(mode)
    options: dict[str, Any] = {"transparency": bytes(range(256))} if mode == "P" else {}
    changed.save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(str(path)).mode == "RGB"


def test_a_picture_that_is_not_square_is_cut_for_clip_and_squeezed_for_siglip() -> None:
    """The middle is kept, or everything."""
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (0, 0, 32, 32))
    cut, _ = prepare([wide], [], (IMAGE, IMAGE), is_siglip=False)
    squeezed, _ = prepare([wide], [], (IMAGE, IMAGE), is_siglip=True)
    assert cut.unique().numel() == 3  # black, in each channel
    assert (squeezed[0, :, :, 0] == 1).all()
    assert (squeezed[0, :, :, -1] == -1).all()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        '{"do_center_crop": false}',
        '{"resample": 0}',
        '{"image_mean": [1, 2]}',
        '{"image_std": [0, 1, 1]}',
        '{"image_std": "wide"}',
        '{"image_mean": [1e300, 1, 1]}',
        '{"image_std": [1e-300, 1, 1]}',
        f'{{"image_mean": [1{"0" * 400}, 1, 1]}}',
        "not json",
    ],
)
def test_preprocessing_that_cannot_be_done(tmp_path: Path, document: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(document)
    picture = open_picture(str(RED))

    error = refused("FC401", prepare, [picture], [str(tmp_path)], (IMAGE, IMAGE), is_siglip=False)
    assert error.where == str(tmp_path / "preprocessor_config.json")


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("FC401", {"do_center_crop": True}),
        ("FC401", {"do_normalize": False}),
        ("FC401", {"rescale_factor": 1}),
        ("FC401", {"rescale_factor": 0.5}),
        ("FC401", {"image_mean": 0.5}),
        ("FC401", {"image_mean": [0.5, 0.5, 10**400]}),
        ("FC401", {"image_std": [0.5, 0.5, 0.0]}),
        ("FC401", {"image_std": [0.5, 0.5, "\x1b[31m"]}),
        ("FC401", {"resample": 9}),
        ("FC401", {"resample": [3]}),
        ("FC484", {"size": {"height": 448, "width": 448}}),
        ("FC484", {"size": 448}),
        ("FC484", {"size": {"shortest_edge": IMAGE}}),
    ],
)
def test_a_preprocessor_that_does_not_serve(
    tmp_path: Path, code: str, settings: dict[str, Any]
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    pictures = [open_picture(str(RED))]
    error = refused(code, prepare, pictures, [str(tmp_path)], (IMAGE, IMAGE), is_siglip=True)
    assert next(iter(settings)) in error.message
    assert "\x1b" not in error.message
    assert error.where == str(path)

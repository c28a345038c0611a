"""Decoding of image files to RGB pixels. The memory of all threads together is limited, whatever the files hold.

Memory is reserved before it is allocated: for the file's bytes in `READING`, before they are read, and for its pixels
in `DECODING`, once the header has been read. A thread that holds a reservation in `READING` may wait for one in
`DECODING`, but never the other way round, so threads cannot wait for each other for ever.
"""

import collections
import contextlib
import ctypes
import io
import logging
import math
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from diffussm_jax.data.headers import can_be_scaled, check_tiff_tags, has_several_scans, tiff_block_pixels
from diffussm_jax.data.transforms import MAX_SCALED_PIXELS

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
MAX_ENCODED_BYTES = 257 << 20  # MAX_PIXELS of uncompressed RGB, and a header
MAX_EXIF_BYTES = 1 << 20  # Pillow makes Python numbers of them, 18 times as large
# Formats that Pillow decodes itself. Others may run programs: EPS calls Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_HEAD_BYTES = 16  # enough for Pillow to tell the format
_PIECE_BYTES = 1 << 20  # read at once
_STRIP_PIXELS = 1 << 18  # converted at once

# Pillow imports its plugins lazily. In a thread that fails while another library (such as TFDS) has replaced
# `__import__` for lazy imports.
Image.init()

# Warnings about odd metadata of single images are noise, and `warnings.catch_warnings` is not thread-safe. What Pillow
# logs and libtiff prints to stderr about damaged images is noise too, because exceptions follow.
for _category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
_libtiff = ctypes.CDLL(Image.core.__file__)
for _name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
    if hasattr(_libtiff, _name):
        getattr(_libtiff, _name)(None)

# Pillow's default of 16 MiB makes glibc keep freed blocks, and in each thread other ones. It never keeps 32 MiB.
Image.core.set_block_size(64 << 20)


class BrokenImage(ValueError):  # noqa: N818 - the name describes the item
    """Raised for an item that cannot be read or decoded. The message has its key and the reason."""

    def __init__(self, key: str, reason: object):
        super().__init__(key, reason)  # both arguments, for pickling

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class Budget:
    """Bytes that the threads of a process may reserve together. Threads that wait are served in order.

    Args:
      num_bytes: the limit.
    """

    def __init__(self, num_bytes: int):
        self.num_bytes, self.num_reserved = num_bytes, 0
        self._waiting: collections.deque = collections.deque()
        self._changed = threading.Condition()

    def reserve(self, num_bytes: int) -> "_Reservation":
        """Waits until `num_bytes` are free and reserves them within the block. If the limit is less, all of it."""
        return _Reservation(self, min(num_bytes, self.num_bytes))

    def acquire(self, num_bytes: int) -> None:
        """Waits until `num_bytes`, at most the limit, are free, and reserves them."""
        with self._changed:
            if self._waiting or self.num_reserved + num_bytes > self.num_bytes:
                ticket = object()
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(
                        lambda: self._waiting[0] is ticket and self.num_reserved + num_bytes <= self.num_bytes
                    )
                finally:
                    self._waiting.remove(ticket)
                    self._changed.notify_all()  # the next one's turn may have come
            self.num_reserved += num_bytes

    def release(self, num_bytes: int) -> None:
        """Frees what `acquire` reserved."""
        with self._changed:
            self.num_reserved -= num_bytes
            if self._waiting:
                self._changed.notify_all()


class _Reservation:
    def __init__(self, budget: Budget, num_bytes: int):
        self._budget, self._num_bytes = budget, num_bytes

    def __enter__(self) -> None:
        self._budget.acquire(self._num_bytes)

    def __exit__(self, *_) -> None:
        self._budget.release(self._num_bytes)


READING = Budget(1 << 30)  # the largest file needs all of it
DECODING = Budget(3 << 29)  # 1.5 GiB; the largest image needs 1.4 GiB


class _Cropping(threading.local):
    """The block of `reserve_until_cropped` that this thread is in."""

    reserved: contextlib.ExitStack | None = None
    size = 0


_cropping = _Cropping()


@contextlib.contextmanager
def reserve_until_cropped(size: int) -> Iterator[None]:
    """Within the block, the memory of an image stays reserved after it is decoded, because it is cropped next.

    A second image decoded in the block ends the reservation of the first.

    Args:
      size: of the crop, in pixels.
    """
    with contextlib.ExitStack() as reserved:
        _cropping.reserved, _cropping.size = reserved, size
        try:
            yield
        finally:
            _cropping.reserved = None


def decode_file(file: BinaryIO, num_bytes: int, key: str) -> np.ndarray:
    """Reads and decodes an image file, as `decode_image`.

    Only the first bytes are read of a file of an unknown format, or of more than `MAX_ENCODED_BYTES`.

    Args:
      file: at the start of the image.
      num_bytes: of the image.
      key: name of the file, for error messages.

    Raises:
      BrokenImage: as `decode_image`.
      ValueError: the file has fewer than `num_bytes`.
      Exception: whatever `file.read` raises.
    """
    head = file.read(min(num_bytes, _HEAD_BYTES))
    if num_bytes > MAX_ENCODED_BYTES or not any(_is_known(head, name) for name in _FORMATS):
        return _decode(head, num_bytes, key)  # raises the error
    with _reserve_encoded(num_bytes, head):
        data = io.BytesIO()
        data.write(head)
        while piece := file.read(min(num_bytes - data.tell(), _PIECE_BYTES)):
            data.write(piece)
        if data.tell() < num_bytes:
            raise ValueError(f"it is cut short: {data.tell():,} of {num_bytes:,} bytes")
        return _decode(data.getvalue(), num_bytes, key)  # not a copy


def decode_image(data: bytes, key: str) -> np.ndarray:
    """Decodes an image file: JPEG, PNG, WebP, BMP, GIF, TIFF or PNM, detected by content, not by name.

    Gray, palette, CMYK and 16-bit images become 8-bit RGB. Transparent images are composited on white. The EXIF
    rotation is applied. Of an animation the first frame is used. A JPEG of more than `MAX_PIXELS` pixels is decoded at
    1/2, 1/4 or 1/8 of its size, the largest that has no more.

    A thread waits while `READING` or `DECODING` has no room for its image.

    Args:
      key: name of the file, for error messages.

    Returns:
      [H, W, 3] uint8, read-only.

    Raises:
      BrokenImage: the format is unknown; the file is truncated or damaged; it has more than `MAX_ENCODED_BYTES`, or
        metadata that take too much memory; or its header has more than `MAX_PIXELS` pixels. JPEGs may have more, but
        not if they are progressive: those take the memory of their full size at any scale.
    """
    with _reserve_encoded(len(data), data[:_HEAD_BYTES]):
        return _decode(data, len(data), key)


def _reserve_encoded(num_bytes: int, head: bytes) -> contextlib.AbstractContextManager[None]:
    if _cropping.reserved is not None:
        _cropping.reserved.close()  # of the previous image: who waits for READING holds nothing in DECODING
    is_plain = _is_known(head, "BMP") or _is_known(head, "PPM")
    return READING.reserve(num_bytes if is_plain else 4 * num_bytes)  # Pillow copies WebP, chunks of PNG, and metadata


def _decode(data: bytes, num_bytes: int, key: str) -> np.ndarray:
    """Decodes a file of `num_bytes`, or raises `BrokenImage`."""
    if not num_bytes:
        raise BrokenImage(key, "the file is empty")
    try:
        if num_bytes > MAX_ENCODED_BYTES:
            raise ValueError(f"{num_bytes:,} bytes, more than {MAX_ENCODED_BYTES:,}")
        return _to_pixels(data)
    except Image.UnidentifiedImageError as error:
        raise BrokenImage(key, f"not an image of a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
        error.__traceback__ = None  # it would keep the image
        raise BrokenImage(key, f"{type(error).__name__}: {error}") from error


def _to_pixels(data: bytes) -> np.ndarray:
    with _open(data) as image:  # from the header: nothing is decoded yet
        _limit_pixels(image, data)
        with _reserve_pixels(_peak_bytes(image, data)):
            image.load()
            for name in ("exif", "Raw profile type exif"):
                _check_exif(len(image.info.get(name, "")))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)


def _reserve_pixels(num_bytes: int) -> contextlib.AbstractContextManager[None]:
    if _cropping.reserved is None:
        return DECODING.reserve(num_bytes)
    _cropping.reserved.enter_context(DECODING.reserve(num_bytes))
    return contextlib.nullcontext()


def _is_known(head: bytes, form: str) -> bool:
    """Whether Pillow takes a file with these first bytes for one of a format."""
    return Image.OPEN[form][1](head) is True


def _open(data: bytes) -> Image.Image:
    if _is_known(data[:_HEAD_BYTES], "TIFF"):
        check_tiff_tags(data)
    if not data.startswith(b"\xff\xd8\xff"):
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    if len(data) > MAX_EXIF_BYTES:
        _check_exif(data.count(b"Exif\0\0") << 16)  # at most, in segments of 64 KiB; opening unpacks them
    try:
        return JpegImageFile(io.BytesIO(data))  # Image.open refuses twice MAX_PIXELS, even of a JPEG
    except SyntaxError as error:
        raise Image.UnidentifiedImageError(str(error)) from error


def _check_exif(num_bytes: int) -> None:
    if num_bytes > MAX_EXIF_BYTES:
        raise ValueError(f"{num_bytes:,} bytes of EXIF, more than {MAX_EXIF_BYTES:,}")


def _limit_pixels(image: Image.Image, data: bytes) -> None:
    """Scales a JPEG that has too many pixels, and refuses other such images."""
    width, height = image.size
    if width * height <= MAX_PIXELS:
        return
    problem = f"{width} x {height} pixels, more than {MAX_PIXELS:,}"
    if not isinstance(image, JpegImageFile):
        raise ValueError(problem)
    if not can_be_scaled(image, data):
        raise ValueError(f"{problem}, progressive or lossless")
    scale = next(n for n in (2, 4, 8) if math.ceil(width / n) * math.ceil(height / n) <= MAX_PIXELS)
    image.draft(None, (width // scale, height // scale))


def _peak_bytes(image: Image.Image, data: bytes) -> int:
    """Memory that decoding takes at most, and then cropping, without `data`. Measured with Pillow 13."""
    width, height = image.size
    pixels = width * height
    peak = 8 * pixels  # Pillow's RGB, and its rotated copy or ours
    if image.format == "JPEG" and has_several_scans(image, data):  # libjpeg keeps all coefficients, in 16 bits
        samples = pixels * sum(h * v for _, h, v, _ in image.layer)
        largest = max(h for _, h, _, _ in image.layer) * max(v for _, _, v, _ in image.layer)
        peak = max(peak, 4 * pixels + 2 * samples // largest)
    elif image.format == "WEBP":
        peak = 17 * pixels  # libwebp's two canvases, and a copy of one
    elif image.format == "TIFF":
        peak = max(peak, 4 * pixels + 8 * tiff_block_pixels(image, MAX_PIXELS))  # 16-bit RGBA
    elif image.format == "PPM" and image.tile[0][0] != "raw":
        peak = 13 * pixels + (32 << 20)  # Python decodes text and unusual ranges
    return peak if _cropping.reserved is None else max(peak, crop_bytes(width, height, _cropping.size))


def crop_bytes(width: int, height: int, size: int) -> int:
    """Memory that an image takes at most while `transforms` crop it to size x size pixels."""
    short, long = sorted((width, height))
    scaled = (1.25 * size) ** 2 * long / short  # 1.25 of a random crop
    return 10 * width * height + 12 * round(min(scaled, MAX_SCALED_PIXELS))


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Converts to [H, W, 3] in strips, because Pillow would hold several copies of the image."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if rows >= height:
        return np.asarray(_strip_to_rgb(image))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, width, bottom)))
    pixels.flags.writeable = False
    return pixels


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # I, I;16, I;16B, ...
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image, mask=image)
        return on_white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Rescales 16-bit gray from [0, 65535] to [0, 255]. Pillow's own conversion clips."""
    values = np.asarray(image)
    # Mode "I" also holds 32-bit TIFFs, whose black and white levels are unknown.
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"gray values {values.min()} ... {values.max()} exceed 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))

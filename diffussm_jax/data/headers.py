"""What the headers of JPEG and TIFF files say about the memory that decoding takes, before Pillow allocates it."""

import re
import struct

from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

MAX_TAG_VALUES = 1 << 16
_SUB_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # EXIF, GPS, interoperability
_BYTES_TYPES = (1, 2, 7)  # of values that Pillow does not unpack to numbers
_OFFSET_TYPES = {4: "I", 13: "I", 16: "Q"}  # LONG, IFD, LONG8
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323


def has_several_scans(image: JpegImageFile, data: bytes) -> bool:
    """Whether a JPEG has several scans, as progressive ones do, so that libjpeg keeps the whole image in memory.

    Args:
      image: just opened from `data`, so that its file is behind the header of the first scan.
    """
    end = image.fp.tell()

    def is_header_of(n):  # of a scan with n components
        return data[end - 8 - 2 * n : end].startswith(bytes((0xFF, 0xDA, 0, 6 + 2 * n, n)))

    # A crafted header might look like that of n components and of fewer.
    return "progressive" in image.info or [n for n in (1, 2, 3, 4) if is_header_of(n)] != [image.layers]


def can_be_scaled(image: JpegImageFile, data: bytes) -> bool:
    """Whether decoding a JPEG at reduced size takes less memory, and is safe: it has one scan, and is not lossless.

    libjpeg does not scale lossless JPEGs. It would write full lines into Pillow's buffer for reduced ones.

    Args:
      image: just opened from `data`.
    """
    width, height = image.size
    frame = re.escape(struct.pack(">HBHHB", 8 + 3 * image.layers, 8, height, width, image.layers))
    kinds = re.findall(b"\xff([\xc0-\xcf])" + frame, data[: image.fp.tell()])
    return kinds in ([b"\xc0"], [b"\xc1"]) and not has_several_scans(image, data)  # baseline, extended


def check_tiff_tags(data: bytes) -> None:
    """Checks how many values the tags of a TIFF have, most of them places of strips or tiles.

    Pillow makes up to 400 bytes of Python objects of each.

    Raises:
      ValueError: there are more than `MAX_TAG_VALUES`.
    """
    order, is_big = "<" if data[:1] == b"I" else ">", data[2] == 43  # BigTIFF, as Pillow sees it
    number, count = (struct.Struct(order + form) for form in ("QQ" if is_big else "IH"))
    entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
    directories, num_values = [*number.unpack_from(data, number.size)], 0
    for start in directories:  # more are appended
        if start + count.size > len(data):
            continue
        (num_entries,) = count.unpack_from(data, start)
        start += count.size
        end = start + min(num_entries, (len(data) - start) // entry.size) * entry.size
        for tag, kind, num, value in entry.iter_unpack(memoryview(data)[start:end]):
            num_values += 1 if kind in _BYTES_TYPES else num
            if num_values > MAX_TAG_VALUES:
                raise ValueError(f"a TIFF with more than {MAX_TAG_VALUES:,} strips, tiles or other values")
            if tag in _SUB_DIRECTORIES:
                form = _OFFSET_TYPES.get(kind, "")
                if not form or num != 1 or struct.calcsize(form) > len(value):
                    raise ValueError(f"a TIFF whose tag {tag} is no offset")
                (offset,) = struct.unpack_from(order + form, value)
                if offset not in directories:
                    directories.append(offset)


def tiff_block_pixels(image: TiffImageFile, max_pixels: int) -> int:
    """Pixels of the strips or tiles that libtiff decodes at once.

    Raises:
      ValueError: tiles of more than `max_pixels` pixels.
    """
    width, height = image.size
    tile = [image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
    if not all(isinstance(length, int) for length in tile) or tile[0] * tile[1] > max_pixels:
        raise ValueError(f"tiles of {tile[0]!r:.20} x {tile[1]!r:.20} pixels, more than {max_pixels:,}")
    rows = image.tag_v2.get(_ROWS_PER_STRIP, height)
    return max(tile[0] * tile[1], width * min(rows, height) if isinstance(rows, int) else width * height)

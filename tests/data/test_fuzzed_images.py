"""Whatever lies in a folder, zip or tar, an item is RGB pixels or a BrokenImage, and nothing is written anywhere."""

import io
import os
import resource
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm_jax.data.decoding import DECODING, MAX_PIXELS, READING, BrokenImage, decode_image
from diffussm_jax.data.sources import Example, ImageTar, ImageZip, open_source

ORIENTATION = 0x0112

# pytest undoes the filters of diffussm_jax.data.images; that they work is the last test's business.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("UserWarning", "RuntimeWarning")]


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def from_pixels(values):
    return Image.fromarray(np.asarray(values, np.uint8))


def rotated(orientation, form="JPEG"):
    """24 x 16, its left half red and its right half blue as stored."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12, 0] = pixels[:, 12:, 2] = 255
    return encoded(Image.fromarray(pixels), form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))


def huge_png(width, height):
    """A PNG of a hundred bytes whose header claims width x height pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def corpus():
    """(name: content of files that decode, of files that do not, of files that may do either)."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    animation = [photo.resize((30, 20)), photo.resize((30, 20)).rotate(180)]
    palette = photo.quantize(16)
    whole = {
        "photo.jpg": encoded(photo, "JPEG"),
        "photo.png": encoded(photo),
        "photo.webp": encoded(photo, "WEBP", lossless=True),
        "photo.tif": encoded(photo, "TIFF"),
        "photo.bmp": encoded(photo, "BMP"),
        "photo.ppm": encoded(photo, "PPM"),
        "png.jpg": encoded(photo),
        "animation.gif": encoded(animation[0], "GIF", save_all=True, append_images=animation[1:]),
        "animation.webp": encoded(animation[0], "WEBP", save_all=True, append_images=animation[1:]),
        "apng.png": encoded(animation[0], "PNG", save_all=True, append_images=animation[1:]),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "gray.jpg": encoded(photo.convert("L"), "JPEG"),
        "progressive.jpg": encoded(photo, "JPEG", progressive=True),
        "gray16.png": encoded(Image.fromarray(rng.integers(0, 65536, (9, 8), np.uint16))),
        "gray16.tif": encoded(Image.fromarray(rng.integers(0, 65536, (9, 8), np.uint16)), "TIFF"),
        "palette.png": encoded(palette, transparency=3),
        "opaque.gif": encoded(palette, "GIF"),
        "la.png": encoded(photo.convert("LA")),
        "rgba.webp": encoded(photo.convert("RGBA"), "WEBP"),
        "1bit.png": encoded(photo.convert("1")),
        "1bit.tif": encoded(photo.convert("1"), "TIFF", compression="group4"),
        "1x1.png": encoded(photo.resize((1, 1))),
        "1x4000.jpg": encoded(photo.resize((1, 4000)), "JPEG"),
        "rotated.jpg": rotated(6),
    }
    broken = {
        "empty.jpg": b"",
        "text.jpg": b"<html>404 Not Found</html>",
        "bomb.png": huge_png(30_000, 30_000),
        "large.png": huge_png(MAX_PIXELS // 1000 + 1, 1000),
        "endless.png": huge_png(2**31 - 1, 2**31 - 1),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/evil) (w) file\n",
    }
    either = {}
    for name in (
        "photo.jpg",
        "photo.png",
        "photo.webp",
        "photo.tif",
        "animation.gif",
        "progressive.jpg",
        "rotated.jpg",
    ):
        data = whole[name]
        for i in range(6):
            either[f"cut{i}_{name}"] = data[: rng.integers(1, len(data))]
            damaged = bytearray(data)
            for position in rng.integers(0, len(data) if i % 2 else min(len(data), 200), 1 + 4 * i):
                damaged[position] ^= 1 << rng.integers(8)
            either[f"flipped{i}_{name}"] = bytes(damaged)
    return whole, broken, either


def write(kind, root, files):
    names = {f"{'ab'[i % 2]}/{name}": data for i, (name, data) in enumerate(files.items())}
    path = root / {"folder": "data", "zip": "data.zip", "tar": "data.tar"}[kind]
    if kind == "folder":
        for name, data in names.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path
    evil = {"../evil.jpg": files["photo.jpg"], f"{root}/evil.jpg": files["photo.jpg"], "a/../../evil.jpg": b"x"}
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the duplicate name
            for name, data in [("a/photo.jpg", b"older"), *names.items(), *evil.items()]:
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in [("a/photo.jpg", b"older"), *names.items(), *evil.items()]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("a/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    return path


def everything_below(root):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_every_item_is_pixels_or_a_broken_image(tmp_path, kind, monkeypatch):
    whole, broken, either = corpus()
    (tmp_path / "in").mkdir()
    path = write(kind, tmp_path / "in", whole | broken | either)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = everything_below(tmp_path)
    source = open_source(str(path))
    assert len(source) == len(whole | broken | either)
    outcome = {}
    for i in range(len(source)):
        try:
            example = source[i]
        except BrokenImage as error:
            name = source._keys[i].split("/")[1]
            assert name in str(error) and len(str(error)) > len(source._keys[i]) + 5
            outcome[name] = None
        else:
            assert isinstance(example, Example) and example.label == "ab".index(example.key[0])
            assert example.image.dtype == np.uint8 and example.image.ndim == 3 and example.image.shape[-1] == 3
            outcome[example.key.split("/")[1]] = example.image.shape
    assert all(outcome[name] for name in whole), {name for name in whole if not outcome[name]}
    assert not any(outcome[name] for name in broken), {name for name in broken if outcome[name]}
    assert outcome["1x4000.jpg"] == (4000, 1, 3) and outcome["rotated.jpg"] == (24, 16, 3)
    assert all(outcome[name] is None for name in either if name.startswith("cut") and "photo.png" in name)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_fuzzed_archive_opens_or_is_refused(tmp_path, kind):
    rng = np.random.default_rng(1)
    photo = encoded(Image.new("RGB", (4, 4), "red"))
    path = write(kind, tmp_path, {"photo.jpg": photo, "b.png": photo, "c.png": photo})
    data = path.read_bytes()
    kinds = {"zip": ImageZip, "tar": ImageTar}
    opened = 0
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data.rstrip(b"\0")), rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            source = kinds[kind](path)
        except ValueError as error:
            assert path.name in str(error)
            continue
        opened += 1
        for i in range(len(source)):
            try:
                source[i]
            except BrokenImage:
                pass
    assert opened


def test_damaged_bzip2_is_a_broken_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_BZIP2) as file:
        for name in ("a.png", "b.png"):
            file.writestr(name, encoded(Image.new("RGB", (64, 64), "red")))
    data = bytearray((tmp_path / "data.zip").read_bytes())
    data[data.index(b"BZh") + 4] ^= 0xFF
    (tmp_path / "data.zip").write_bytes(data)
    source = ImageZip(tmp_path / "data.zip")
    with pytest.raises(BrokenImage, match=r"a\.png.*Invalid data stream"):
        source[0]
    assert source[1].image.shape == (64, 64, 3)


def test_a_negative_size_does_not_loop_for_ever(tmp_path):
    """CPython issue 130577: tarfile went back and forth between such members without end."""
    member = tarfile.TarInfo("a/1.png")
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 12  # base 256: -1
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    (tmp_path / "data.tar").write_bytes(bytes(block) + bytes(10240))
    with pytest.raises(ValueError, match="data.tar is not a tar file, or is damaged"):
        ImageTar(tmp_path / "data.tar")


def test_16_bits_are_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.round(values / 257)[..., None].repeat(3, -1)
    for form in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(values), form), "x"), expected)
    pnm = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(pnm, "x"), expected)
    for unknown in (np.array([[-1, 70_000]], np.int32), np.array([[0.5]], np.float32)):
        with pytest.raises(BrokenImage, match="x: ValueError: (gray values|floating-point)"):
            decode_image(encoded(Image.fromarray(unknown), "TIFF"), "x")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotations_are_done(form):
    red, blue = [255, 0, 0], [0, 0, 255]
    # orientation: (shape, first pixel, last pixel); as stored, the left half is red
    expected = {1: ((16, 24), red, blue), 3: ((16, 24), blue, red), 6: ((24, 16), red, blue), 8: ((24, 16), blue, red)}
    for orientation, (shape, first, last) in expected.items():
        image = decode_image(rotated(orientation, form), "x").astype(int)
        assert image.shape == (*shape, 3)
        assert np.abs(image[1, 1] - first).max() < 30 and np.abs(image[-2, -2] - last).max() < 30
        half = image[1, -2] if shape == (24, 16) else image[-2, 1]  # the other corner of the first half
        assert np.abs(half - first).max() < 30


def test_transparency_is_laid_on_white():
    rgba = from_pixels([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]])
    expected = [[[255, 255, 255], [200, 100, 0], [244, 224, 204]]]  # c * a + 255 * (1 - a)
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        np.testing.assert_array_equal(decode_image(encoded(rgba, form, **options), "x"), expected)
    gray = Image.merge("LA", [from_pixels([[100, 100]]), from_pixels([[255, 0]])])
    np.testing.assert_array_equal(decode_image(encoded(gray), "x"), [[[100] * 3, [255] * 3]])
    palette = from_pixels([[0, 1, 2]])
    palette.putpalette([9, 8, 7, 50, 60, 70, 1, 2, 3])
    for form in ("PNG", "GIF"):
        image = decode_image(encoded(palette, form, transparency=1), "x")
        np.testing.assert_array_equal(image, [[[9, 8, 7], [255] * 3, [1, 2, 3]]])
    np.testing.assert_array_equal(decode_image(encoded(palette), "x")[0, 1], [50, 60, 70])
    color_key = encoded(from_pixels([[[1, 2, 3], [4, 5, 6]]]), transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode_image(color_key, "x"), [[[255] * 3, [4, 5, 6]]])


def test_other_modes_become_rgb():
    np.testing.assert_array_equal(decode_image(encoded(from_pixels([[7, 200]])), "x"), [[[7] * 3, [200] * 3]])
    bits = from_pixels([[0, 255]]).convert("1")
    np.testing.assert_array_equal(decode_image(encoded(bits), "x"), [[[0] * 3, [255] * 3]])
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    assert np.abs(decode_image(encoded(cmyk, "JPEG", quality=100), "x").astype(int) - [255, 0, 0]).max() < 12
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode_image(data, "x"), np.full((2, 3, 3), [255, 0, 0]))


def test_too_many_pixels_are_refused_by_the_header():
    with pytest.raises(BrokenImage, match="bomb.png: .*30000 x 30000 pixels|bomb.png: DecompressionBombError"):
        decode_image(huge_png(30_000, 30_000), "bomb.png")
    with pytest.raises(BrokenImage, match="10000 x 9000 pixels, more than 89,478,485"):
        decode_image(huge_png(10_000, 9_000), "x")


def test_pillow_warns_of_nothing():
    program = (
        "import io, sys; from diffussm_jax.data.decoding import *\n"
        "for line in sys.stdin:\n"
        "    try: decode_image(bytes.fromhex(line), 'x')\n"
        "    except BrokenImage: pass\n"
        "print('done')"
    )
    _, broken, either = corpus()
    odd = [*broken.values(), *either.values(), huge_png(10_000, 9_000)]
    run = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(data.hex() + "\n" for data in odd if data),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": ""},
    )
    assert (run.stdout, run.stderr) == ("done\n", "")


def mutated(data, rng):
    """Data with bytes changed, inserted and deleted in up to five places, half of them near the start."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        position = rng.integers(max(1, len(data) if rng.integers(2) else min(len(data), 100)))
        kind = rng.integers(6)
        if kind < 3:
            data[position : position + 1] = bytes([rng.choice([0, 1, 127, 128, 255, rng.integers(256)])])
        elif kind == 3:
            data[position : position + 4] = rng.bytes(4)
        elif kind == 4:
            data[position:position] = data[rng.integers(max(1, len(data))) :][: rng.integers(200)]
        else:
            del data[position : position + rng.integers(20)]
    return bytes(data)


def fuzzed_images(num, rng):
    whole, broken, _ = corpus()
    photo = from_pixels(rng.integers(0, 256, (40, 60, 3)))
    for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        whole[name] = encoded(photo, "TIFF", compression=name)
    files = [*whole.values(), *broken.values()]
    return [mutated(files[rng.integers(len(files))], rng) for _ in range(num)]


def fuzzed_archives(num, rng):
    """(extension, content) of zip files of each compression, and of tars, with whole and with mutated images."""
    whole = corpus()[0]
    for i in range(num):
        names = rng.permutation([*whole])[:8]
        files = {f"a/{name}": mutated(whole[name], rng) if rng.integers(2) else whole[name] for name in names}
        archive = io.BytesIO()
        if i % 2:
            with tarfile.open(fileobj=archive, mode="w") as file:
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
        else:
            compressions = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            with zipfile.ZipFile(archive, "w", compressions[i // 2 % 4]) as file:
                for name, data in files.items():
                    file.writestr(name, data)
        yield ("zip", "tar")[i % 2], mutated(archive.getvalue(), rng)


def decode_fuzzed_files(folder, num_images, num_archives):
    """Prints how many images were decoded and how many were broken, and the memory that they took at most, in MB."""
    rng = np.random.default_rng(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def is_decoded(decode, *args):
        try:
            image = decode(*args)
        except BrokenImage:
            return False
        image = image.image if isinstance(image, Example) else image
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
        return True

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda data: is_decoded(decode_image, data, "x"), fuzzed_images(num_images, rng)))
        for extension, data in fuzzed_archives(num_archives, rng):
            path = Path(folder, f"data.{extension}")
            path.write_bytes(data)
            try:
                source = {"zip": ImageZip, "tar": ImageTar}[extension](path)
            except ValueError:
                continue
            found += pool.map(lambda i, source=source: is_decoded(source.__getitem__, i), range(len(source)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(sum(found), len(found) - sum(found), grown // 1024)


@pytest.mark.slow
def test_many_fuzzed_files_give_pixels_or_broken_images(tmp_path):
    """Nothing else happens: no other error, no output, no memory beyond the limits. It takes a minute."""
    program = "import sys, test_fuzzed_images as t; t.decode_fuzzed_files(sys.argv[1], 100_000, 4_000)"
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert (run.returncode, run.stderr) == (0, "")
    num_decoded, num_broken, grown = map(int, run.stdout.split())
    assert num_decoded > 10_000 and num_broken > 10_000
    assert grown < (READING.num_bytes + DECODING.num_bytes) / 2**20 + 200

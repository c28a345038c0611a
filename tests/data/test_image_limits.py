"""Images take a limited memory over all threads, whatever a file holds or claims."""

import contextlib
import io
import re
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from diffussm_jax.data import decoding, pixels
from diffussm_jax.data.decoding import MAX_ENCODED_BYTES, MAX_PIXELS, BrokenImage, Budget, decode_image
from diffussm_jax.data.headers import MAX_TAG_VALUES, has_several_scans
from diffussm_jax.data.images import ImageFolder, ImageZip

PNG = b"\x89PNG\r\n\x1a\n"


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(width=300, height=200, mode="RGB"):
    """Smooth colours, so that a smaller photo looks like this one."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    values = np.stack([x / width, y / height, (x + y) / (width + height)], -1)
    return Image.fromarray((255 * values).astype(np.uint8)).convert(mode)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_zip(path, data, method, num_bytes=None, compresslevel=1):
    """A zip file of one image, a.png, which is said to have `num_bytes`."""
    with zipfile.ZipFile(path, "w", method, compresslevel=compresslevel) as archive:
        archive.writestr("a.png", data)
        archive.infolist()[0].file_size = len(data) if num_bytes is None else num_bytes
    return ImageZip(path)


@contextlib.contextmanager
def peak_below(num_bytes):
    """Checks how much memory Python objects take at most."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


def test_threads_stay_within_a_budget():
    rng, budget, lock = np.random.default_rng(0), Budget(100), threading.Lock()
    in_use, peak = [], 0

    def work(num_bytes):
        nonlocal peak
        with budget.reserve(num_bytes):
            with lock:
                in_use.append(num_bytes)
                peak = max(peak, sum(in_use))
                assert sum(in_use) <= 100 or in_use == [num_bytes]  # what is larger than the budget runs alone
            time.sleep(0.001)
            with lock:
                in_use.remove(num_bytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, rng.choice([1, 10, 40, 60, 100, 250], 200).tolist()))
    assert peak == 250
    with pytest.raises(ZeroDivisionError), budget.reserve(100):
        raise ZeroDivisionError
    with budget.reserve(100):  # the room is free again
        pass


def test_a_large_reservation_is_not_overtaken():
    budget, order = Budget(10), []

    def work(num_bytes):
        with budget.reserve(num_bytes):
            order.append(num_bytes)

    with budget.reserve(5):
        threads = [threading.Thread(target=work, args=[n]) for n in (10, 1, 2)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        assert order == []
    for thread in threads:
        thread.join()
    assert order[0] == 10


def test_decoding_waits_for_room(monkeypatch):
    data, running, most = encoded(photo(1000, 1000)), [], 0

    def to_rgb(image):
        nonlocal most
        running.append(image)
        most = max(most, len(running))
        time.sleep(0.02)
        running.remove(image)
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(decoding, "_to_rgb", to_rgb)
    for num_bytes, expected in ((1 << 30, 6), (17_000_000, 2), (10, 1)):
        monkeypatch.setattr(decoding, "DECODING", Budget(num_bytes))
        most = 0
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: decode_image(data, "x"), range(12)))
        assert most == expected if expected < 6 else most > 2


def test_the_memory_of_threads_is_limited(tmp_path):
    """Six images of 20 megapixels, 160 MB each, of which a budget of 200 MB lets one be decoded at a time."""
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (5000, 4000)), compress_level=1))
    program = (
        "import resource, sys; from concurrent.futures import ThreadPoolExecutor\n"
        "from diffussm_jax.data import decoding; from diffussm_jax.data.images import ImageFolder\n"
        "from diffussm_jax.data.transforms import center_crop\n"
        "decoding.DECODING, source = decoding.Budget(200 << 20), ImageFolder(sys.argv[1])\n"
        "def crop(_):\n"
        "    with decoding.reserve_until_cropped(64): return center_crop(source[0].image, 64).shape\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with ThreadPoolExecutor(8) as pool: assert set(pool.map(crop, range(6))) == {(64, 64, 3)}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 300e6


def test_memory_stays_reserved_until_an_image_is_cropped(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(photo()))
    source, budget = ImageFolder(tmp_path), Budget(1 << 30)
    monkeypatch.setattr(decoding, "DECODING", budget)
    source[0]
    assert budget.num_reserved == 0
    with decoding.reserve_until_cropped(64):
        source[0]
        once = budget.num_reserved
        assert once >= 10 * 300 * 200
        source[1]
        assert budget.num_reserved == once
    assert budget.num_reserved == 0
    reserved = []
    center_crop = pixels.center_crop
    monkeypatch.setattr(
        pixels, "center_crop", lambda *args: (reserved.append(budget.num_reserved), center_crop(*args))[1]
    )
    record = pixels.Pixels(source, 64, 3)[0]
    assert reserved == [once] and budget.num_reserved == 0
    assert record["image"].base is None  # a view would keep the scaled image in memory


def test_a_broken_image_does_not_keep_its_pixels():
    data = encoded(photo())
    with pytest.raises(BrokenImage) as caught:
        decode_image(data[: len(data) // 2], "x")
    assert caught.value.__cause__.__traceback__ is None
    assert decoding.DECODING.num_reserved == decoding.READING.num_reserved == 0


def test_what_is_no_image_is_not_expanded(tmp_path):
    zeros = write_zip(tmp_path / "zeros.zip", bytes(200_000_000), zipfile.ZIP_DEFLATED)
    large = write_zip(tmp_path / "large.zip", PNG + bytes(300_000_000), zipfile.ZIP_DEFLATED, 900_000_000)
    with peak_below(1e6):
        with pytest.raises(BrokenImage, match="a.png: not an image of a known format"):
            zeros[0]
        with pytest.raises(BrokenImage, match=f"a.png: .*900,000,000 bytes, more than {MAX_ENCODED_BYTES:,}"):
            large[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_no_more_is_expanded_than_was_declared(tmp_path, method):
    source = write_zip(tmp_path / "data.zip", encoded(photo()) + bytes(30_000_000), method, 100_000)
    with peak_below(12e6), contextlib.suppress(BrokenImage):
        source[0]
    image = encoded(photo())
    source = write_zip(tmp_path / "whole.zip", image, method)
    np.testing.assert_array_equal(source[0].image, decode_image(image, "x"))
    with pytest.raises(BrokenImage, match=r"a.png: cannot be read: .*(cut short|CRC-32|EOF)"):
        write_zip(tmp_path / "short.zip", image, method, len(image) + 1)[0]


def test_files_are_limited(tmp_path):
    assert 3 * MAX_PIXELS + 1000 < MAX_ENCODED_BYTES < 300e6
    with (tmp_path / "a.png").open("wb") as file:
        file.write(PNG)
        file.truncate(MAX_ENCODED_BYTES + 1)
    with peak_below(1e6), pytest.raises(BrokenImage, match=f"a.png: .*{MAX_ENCODED_BYTES + 1:,} bytes, more than"):
        ImageFolder(tmp_path)[0]


def test_large_jpegs_are_scaled(monkeypatch):
    data = encoded(photo(600, 400), "JPEG", quality=95)
    full = decode_image(data, "x")
    np.testing.assert_array_equal(full, np.asarray(Image.open(io.BytesIO(data))))
    for scale in (2, 4, 8):
        monkeypatch.setattr(decoding, "MAX_PIXELS", 600 * 400 // scale**2)
        image = decode_image(data, "x")
        assert image.shape == (400 // scale, 600 // scale, 3)
        means = full.reshape(400 // scale, scale, 600 // scale, scale, 3).mean((1, 3))
        assert np.abs(image - means).max() < 5
    monkeypatch.setattr(decoding, "MAX_PIXELS", 600 * 400)
    np.testing.assert_array_equal(decode_image(data, "x"), full)
    turned = Image.Exif()
    turned[0x0112] = 6
    monkeypatch.setattr(decoding, "MAX_PIXELS", 600 * 400 - 1)
    assert decode_image(encoded(photo(600, 400), "JPEG", exif=turned), "x").shape == (300, 200, 3)


def test_a_jpeg_of_twice_the_pixels_that_pillow_opens(monkeypatch):
    data = encoded(Image.new("L", (14_000, 13_000), 77), "JPEG")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 3_000_000)
    image = decode_image(data, "x")
    assert image.shape == (1625, 1750, 3) and (image == 77).all()


def in_three_scans(width, height):
    """A sequential JPEG with a scan for each component, which Pillow does not write."""
    grays = [encoded(band, "JPEG", quality=90) for band in photo(width, height, "YCbCr").split()]
    frame = grays[0].index(b"\xff\xc0")
    tables = grays[0][frame + 13 : grays[0].index(b"\xff\xda")]
    components = b"".join(bytes((n, 0x11, 0)) for n in (1, 2, 3))
    frame = grays[0][:frame] + struct.pack(">HHBHHB", 0xFFC0, 17, 8, height, width, 3) + components + tables
    scans = [gray[gray.index(b"\xff\xda") + 10 : -2] for gray in grays]
    return (
        frame
        + b"".join(bytes((0xFF, 0xDA, 0, 8, 1, n + 1, 0, 0, 63, 0)) + scan for n, scan in enumerate(scans))
        + (b"\xff\xd9")
    )


def test_jpegs_that_scaling_does_not_make_small_are_refused(monkeypatch):
    kinds = {
        "progressive": encoded(photo(), "JPEG", progressive=True),
        "three scans": in_three_scans(300, 200),
        "lossless": encoded(photo(), "JPEG").replace(b"\xff\xc0", b"\xff\xc3"),  # libjpeg ignores the scale
        "decoy": encoded(photo(), "JPEG", comment=b"\xff\xc0\0\x11\x08\0\xc8\x01\x2c\x03").replace(
            b"\xff\xc0\0\x11\x08\0\xc8\x01\x2c\x03\x01", b"\xff\xc3\0\x11\x08\0\xc8\x01\x2c\x03\x01"
        ),
    }
    for kind in ("progressive", "three scans"):
        image = decode_image(kinds[kind], "x")
        assert np.abs(image - np.asarray(photo(), np.float32)).max() < 20
        with Image.open(io.BytesIO(kinds[kind])) as opened:
            assert has_several_scans(opened, kinds[kind])
    monkeypatch.setattr(decoding, "MAX_PIXELS", 300 * 200 - 1)
    for data in kinds.values():
        with pytest.raises(BrokenImage, match="x: ValueError: 300 x 200 pixels, more than 59,999, progressive or loss"):
            decode_image(data, "x")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_large_images_are_converted_as_small_ones(mode, monkeypatch):
    """Large images are converted by strips."""
    image = photo().convert("L").point(lambda v: 255 * v, "I").convert("I;16") if mode == "I;16" else photo()
    if mode in ("LA", "RGBA"):
        image.putalpha(photo().convert("L").rotate(180))
    image = image if mode == "I;16" else image.convert(mode)
    options = {"transparency": 5} if mode == "P" else {}
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG", **options)
    whole = decode_image(data, "x")
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", 7 * 300 + 5)
    strips = decode_image(data, "x")
    np.testing.assert_array_equal(strips, whole)
    assert not strips.flags.writeable and strips.shape == (200, 300, 3)


def tiff(tags, big=False):
    """A gray TIFF of 16 x 16 pixels with additional tags {tag: (type, count, value or offset)}."""
    entry, count = ("<HHQQ", "<Q") if big else ("<HHII", "<H")
    size = struct.calcsize(entry)
    start = 16 if big else 8
    basic = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 278: 16, 279: 256}
    tags = {tag: (4, 1, value) for tag, value in basic.items()} | {273: (4, 1, 1000)} | tags
    directory = b"".join(struct.pack(entry, tag, *values) for tag, values in sorted(tags.items()))
    header = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) if big else struct.pack("<2sHI", b"II", 42, 8)
    directory = struct.pack(count, len(tags)) + directory + bytes(8)
    assert size and start + len(directory) < 1000
    return (header + directory).ljust(1000, b"\0") + bytes(range(256))


@pytest.mark.parametrize("big", [False, True], ids=["tiff", "bigtiff"])
def test_tiffs_with_millions_of_values_are_refused(big):
    np.testing.assert_array_equal(decode_image(tiff({}, big), "x")[..., 0], np.arange(256).reshape(16, 16))
    num = MAX_TAG_VALUES + 1
    data = bytes(4 * num)
    with peak_below(2e6):
        for tag in (273, 274, 40000):  # places of strips, the orientation, a private one
            with pytest.raises(BrokenImage, match="x: ValueError: a TIFF with more than 65,536 strips"):
                decode_image(tiff({tag: (4, num, 1256)}, big) + data, "x")
        directory = struct.pack("<QHHQQ" if big else "<HHHII", 1, 274, 3, num, 1400).ljust(144, b"\0")
        for tag in (0x8769, 0x8825):  # EXIF, GPS
            with pytest.raises(BrokenImage, match="x: ValueError: a TIFF with more than 65,536 strips"):
                decode_image(tiff({tag: (4, 1, 1256)}, big) + directory + data, "x")
        with pytest.raises(BrokenImage, match="x: ValueError: a TIFF whose tag 34665 is no offset"):
            decode_image(tiff({0x8769: (3, 4, 1256)}, big) + directory + data, "x")


def test_tiles_are_limited():
    tags = {322: (4, 1, 20_000), 323: (4, 1, 20_000), 324: (4, 1, 1000), 325: (4, 1, 256), 259: (4, 1, 8)}
    with pytest.raises(BrokenImage, match="x: ValueError: tiles of 20000 x 20000 pixels, more than 89,478,485"):
        decode_image(tiff(tags), "x")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_is_limited(form):
    """Pillow would make a Python number of each of a million values."""
    exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, 2_000_000, 26, 0) + bytes([1, 2]) * 2_000_000
    image = photo(8, 8)
    if form == "JPEG":
        data = encoded(image, form)
        parts = [b"Exif\0\0" + exif[i : i + 65_000] for i in range(0, len(exif), 65_000)]
        data = data[:2] + b"".join(struct.pack(">HH", 0xFFE1, len(part) + 2) + part for part in parts) + data[2:]
    elif form == "PNG":
        data = encoded(image)
        data = data[:-12] + chunk(b"eXIf", exif) + data[-12:]
    else:
        data = encoded(image, form, exif=exif)
    with (
        peak_below(20e6),
        pytest.raises(BrokenImage, match=r"x: ValueError: [\d,]+ bytes of EXIF, more than 1,048,576"),
    ):
        decode_image(data, "x")


def test_damaged_tiffs_print_nothing():
    program = (
        "import sys; from diffussm_jax.data.decoding import *\n"
        "for line in sys.stdin:\n"
        "    try: decode_image(bytes.fromhex(line), 'x')\n"
        "    except BrokenImage: print('broken')"
    )
    damaged = [tiff({277: (3, 1, 300)})]  # Pillow logs this one
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "group4"):
        image = photo().convert("1") if compression == "group4" else photo()
        data = encoded(image, "TIFF", compression=compression)
        damaged.append(data[:1000] + bytes(re.sub(b".", b"\xa5", data[1000:1200], flags=re.DOTALL)) + data[1200:])
    run = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(data.hex() + "\n" for data in damaged),
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.count("broken") >= 3 and run.stderr == ""

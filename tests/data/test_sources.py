"""Every kind of source gives the same images, labels and keys, in one order, and says what is wrong with bad ones."""

import errno
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm_jax.data import decoding, walk
from diffussm_jax.data.sources import (
    LSUN,
    TFDS,
    BrokenImage,
    Digits,
    ImageFolder,
    ImageTar,
    ImageZip,
    open_source,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


def encode(color, size=(4, 3), form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


FILES = {
    "train/cat/2.png": encode((2, 0, 0)),
    "train/cat/10.PNG": encode((10, 0, 0)),
    "train/ant/1.jpg": encode((1, 0, 0)),  # a PNG, whatever it is called
    "test/cat/3.webp": encode((3, 0, 0), form="WEBP"),
    "train/cat/notes.txt": b"not an image",
    "train/cat/.hidden.png": encode((99, 0, 0)),
    "__MACOSX/train/cat/2.png": encode((99, 0, 0)),
    "train/cat/._2.png": b"a resource fork",
}


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write_tar(path, files):
    path.write_bytes(tar_bytes({f"./{name}": data for name, data in files.items()}))
    return path


KINDS = {"folder": write_folder, "zip": write_zip, "tar": write_tar}


@pytest.fixture(params=KINDS)
def write(request, tmp_path):
    """Writes files, given by name, as a folder, a zip or a tar, and returns its path."""
    kind = request.param
    name = {"folder": "data", "zip": "data.ZIP", "tar": "data.tar"}[kind]
    return lambda files: str(KINDS[kind](tmp_path / name, files))


def test_labels_are_the_folders_that_hold_the_images(write):
    files = dict(reversed(FILES.items()))  # the order in which they lie must not count
    source = open_source(write(files), "train")
    assert source.class_names == ("ant", "cat")
    items = [(e.key, e.label, e.image.shape, e.image[0, 0, 0]) for e in map(source.__getitem__, range(len(source)))]
    assert items == [
        ("train/ant/1.jpg", 0, (3, 4, 3), 1),
        ("train/cat/10.PNG", 1, (3, 4, 3), 10),
        ("train/cat/2.png", 1, (3, 4, 3), 2),
    ]
    assert "split train" in source.description and os.sep not in source.description


def test_no_split_takes_everything_and_merges_classes(write):
    source = open_source(write(FILES))
    assert (source[0].key, source[0].label) == ("test/cat/3.webp", 1)
    assert (len(source), source.class_names) == (4, ("ant", "cat"))


def test_images_without_class_folders_have_no_labels(write):
    path = write({"train/b.png": FILES["train/cat/2.png"], "train/a.png": FILES["train/ant/1.jpg"]})
    source = open_source(path, "train")
    assert (source.class_names, source[1].label, source[1].key) == ((), 0, "train/b.png")
    assert open_source(path).class_names == ("train",)


def test_a_class_is_the_last_folder_of_a_deep_path(write):
    source = open_source(write({"train/animals/cat/a/1.png": encode("red"), "train/2/b/1.png": encode("red")}), "train")
    assert source.class_names == ("a", "b")


def test_an_image_beside_the_class_folders_is_refused(write):
    with pytest.raises(ValueError, match="stray.png is in no class folder"):
        open_source(write(FILES | {"train/stray.png": encode("red")}), "train")


def test_an_unknown_split_and_an_empty_source_are_refused(write):
    path = write(FILES)
    with pytest.raises(ValueError, match=r"no images in .*data.*'tra'.*folders with images: test, train"):
        open_source(path, "tra")
    with pytest.raises(ValueError, match=r"no images in .*split 'none'"):
        open_source(path, "none")


def test_the_fingerprint_says_that_items_changed(tmp_path):
    for kind, write_kind in KINDS.items():
        suffix = "" if kind == "folder" else f".{kind}"
        sources = [
            open_source(str(write_kind(tmp_path / f"{i}{suffix}", files)), "train")
            for i, files in enumerate(
                [
                    FILES,
                    dict(reversed(FILES.items())),
                    FILES | {"train/cat/2.png": encode((2, 0, 0), (9, 9))},
                    FILES | {"train/cat/5.png": encode((2, 0, 0))},
                ]
            )
        ]
        a, same, resized, more = (source.fingerprint() for source in sources)
        assert len(a) == 64 and a == same and len({a, resized, more}) == 3


def test_many_threads_read_one_source(write):
    files = {f"{i % 3}/{i:03d}.png": encode((i, i // 2, 0), (20, 20)) for i in range(200)}
    source = open_source(write(files))
    with ThreadPoolExecutor(16) as pool:
        for i, example in enumerate(pool.map(source.__getitem__, list(range(200)) * 3)):
            number = int(Path(source._keys[i % 200]).stem)
            assert (example.image == (number, number // 2, 0)).all() and example.label == number % 3


def test_a_folder_follows_links_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "elsewhere", {"1.png": encode("red")})
    folder = write_folder(tmp_path / "data", {"a/1.png": encode("red")})
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "again").symlink_to(folder)
    assert ImageFolder(folder)._keys == ["a/1.png", "b/1.png"]


def keys_of(path, split=""):
    return open_source(str(path), split)._keys


@pytest.mark.parametrize("num_links", [1, 2])
def test_links_in_circles_are_read_once(tmp_path, num_links):
    folder = write_folder(tmp_path / "data", {"a/1.png": encode("red"), "b/2.png": encode("red")})
    for i in range(num_links):
        (folder / "a" / f"l{i}").symlink_to("../b")
        (folder / "b" / f"l{i}").symlink_to("../a")
    source = open_source(str(folder))
    assert (source._keys, source.class_names) == (["a/1.png", "b/2.png"], ("a", "b"))


def test_a_circle_through_folders_elsewhere_is_read_once(tmp_path):
    pool = write_folder(tmp_path / "pool", {"x/1.png": encode("red"), "y/2.png": encode("red"), "z/3.png": b""})
    (folder := tmp_path / "data").mkdir()
    (pool / "x" / "l").symlink_to("../y")
    (pool / "y" / "l").symlink_to("../x")
    (pool / "z" / "back").symlink_to(folder)
    for name in "xyz":
        (folder / name).symlink_to(pool / name)
    (folder / "z2").symlink_to(pool / "z")
    assert keys_of(folder) == ["x/1.png", "y/2.png", "z/3.png"]


def test_links_without_circles_may_share_a_folder(tmp_path):
    pool = write_folder(tmp_path / "pool", {"cat/1.png": encode("red"), "cat/more/2.png": encode("red")})
    folder = write_folder(tmp_path / "data", {"test/dog/3.png": encode("red")})
    (folder / "val").symlink_to("test")
    (folder / "train").mkdir()
    (folder / "test" / "dog" / "4.png").symlink_to(pool / "cat" / "1.png")
    (pool / "cat" / "more" / "up").symlink_to(pool / "cat")  # the only circle
    for split in ("train", "test"):
        (folder / split / "cat").symlink_to(pool / "cat")
    cats, dogs = ["cat/1.png", "cat/more/2.png"], ["dog/3.png", "dog/4.png"]
    assert keys_of(folder, "train") == [f"train/{name}" for name in cats]
    assert keys_of(folder, "test") == [f"test/{name}" for name in cats + dogs]
    assert keys_of(folder, "val") == [f"val/{name}" for name in cats + dogs]


def test_links_that_multiply_without_circles_are_refused(tmp_path):
    for i in range(30):
        folder = write_folder(tmp_path / f"{i:02d}", {"1.png": encode("red")})
        for name in "ab":
            (folder / name).symlink_to(tmp_path / f"{i + 1:02d}")
    with pytest.raises(ValueError, match=r"links lead to the folder '.*' on more than 1,000 paths"):
        open_source(str(tmp_path / "00"))


def test_links_in_a_long_row_are_followed_as_far_as_the_system_does(tmp_path, capfd):
    for i in range(60):
        folder = write_folder(tmp_path / f"{i:02d}", {"a/1.png": encode("red")})
        (folder / "l").symlink_to(f"../{i + 1:02d}")
    source = ImageFolder(tmp_path / "00")
    assert 2 < len(source) < 60 and source[len(source) - 1].image.shape == (3, 4, 3) and source.fingerprint()
    assert re.search(r"1 left out: .*Too many levels of symbolic links, such as 'l/l/", capfd.readouterr().err)


def test_what_cannot_be_found_is_left_out_and_counted(tmp_path, capfd):
    folder = write_folder(tmp_path / "data", {"a/1.png": encode("red"), "b/2.png": encode("red")})
    for name in ("a/0.png", "a/3.png", "b/4.png"):
        (folder / name).symlink_to("/nowhere/x.png")
    (folder / "c").symlink_to("/nowhere")
    (folder / "a" / "self.png").symlink_to("self.png")
    source = ImageFolder(folder)
    assert source._keys == ["a/1.png", "b/2.png"] and len(source.fingerprint()) == 64
    said = capfd.readouterr().err
    assert re.search(r"data: 4 left out: No such file or directory, such as 'a/0.png'", said)
    assert re.search(r"data: 1 left out: Too many levels of symbolic links, such as 'a/self.png'", said)
    assert source.num_left_out == 5 and ImageFolder(folder / "b").num_left_out == 1
    (folder / "b" / "4.png").unlink()
    assert ImageFolder(folder, "b").num_left_out == 0


def test_a_folder_without_permission_is_left_out_and_counted(tmp_path, monkeypatch, capfd):
    folder = write_folder(tmp_path / "data", {"a/1.png": encode("red"), "b/2.png": encode("red")})
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).rstrip("/").endswith("data/b"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert keys_of(folder) == ["a/1.png"]
    assert "data: 1 left out: Permission denied, such as 'b'" in capfd.readouterr().err
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):  # a failing disk is no smaller data set
        open_source(str(folder))


def test_backslashes_in_a_zip_separate_folders(tmp_path, capfd):
    files = {"train\\cat\\1.jpg": encode((7, 0, 0)), "train\\dog\\2.jpg": encode("red"), "..\\3.jpg": b""}
    source = open_source(str(write_zip(tmp_path / "data.zip", files)), "train")
    assert (source._keys, source.class_names) == (["train/cat/1.jpg", "train/dog/2.jpg"], ("cat", "dog"))
    assert source[0].image[0, 0, 0] == 7
    assert open_source(str(tmp_path / "data.zip")).num_left_out == 1


def test_tars_in_tars_are_folders_to_some_depth(tmp_path, capfd):
    data = tar_bytes({"1.png": encode((7, 0, 0))})
    for i in range(20):
        (tmp_path / f"{i}.tar").write_bytes(data)
        data = tar_bytes({"a/0.png": encode("red"), f"t{i}.tar": data})
    assert keys_of(tmp_path / "2.tar") == ["a/0.png", "t1/a/0.png", "t1/t0/1.png"]
    deep = ImageTar(tmp_path / "19.tar")
    assert deep.num_left_out == 1
    assert re.search(r"19.tar: 1 left out: a tar in \d+ tars, such as 't18/t17/", capfd.readouterr().err)


def test_a_tar_in_a_tar_in_a_tar_is_read(tmp_path):
    inner = tar_bytes({"1.png": encode((7, 0, 0))})
    (tmp_path / "data.tar").write_bytes(tar_bytes({"train.tar": tar_bytes({"cat.tar": inner, "dog/2.png": b""})}))
    source = ImageTar(tmp_path / "data.tar", "train")
    assert (source._keys, source.class_names) == (["train/cat/1.png", "train/dog/2.png"], ("cat", "dog"))
    assert source[0].image[0, 0, 0] == 7


def test_members_that_would_leave_an_archive_are_left_out_and_counted(tmp_path, capfd):
    evil = {"/1.png": b"", "/a/2.png": b"", "b/../3.png": b"", "/notes.txt": b""}
    inner = tar_bytes({"4.png": encode("red")} | evil)
    (tmp_path / "data.tar").write_bytes(tar_bytes({"x.tar": inner, "y/5.png": encode("red"), "/z.tar": inner} | evil))
    source = ImageTar(tmp_path / "data.tar")
    assert (source._keys, source.class_names, source.num_left_out) == (["x/4.png", "y/5.png"], ("x", "y"), 7)
    assert ImageTar(tmp_path / "data.tar", "x").num_left_out == 3
    said = capfd.readouterr().err
    assert "data.tar: 4 left out: its name leaves the archive, such as '/1.png'" in said
    assert "data.tar: 3 left out: its name leaves the archive x.tar, such as 'x//1.png'" in said


def test_links_in_a_tar_are_left_out_and_counted(tmp_path, capfd):
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name, kind in (("a/1.png", tarfile.REGTYPE), ("a/2.png", tarfile.LNKTYPE), ("a/3.txt", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a/1.png"
            archive.addfile(member)
    assert keys_of(tmp_path / "data.tar") == ["a/1.png"]
    assert "data.tar: 1 left out: it is a link or sparse, such as 'a/2.png'" in capfd.readouterr().err


def test_a_remote_folder_is_walked_by_its_scheme(monkeypatch):
    """Neither a `gs://` in the walked folders nor its absence (fsspec's) changes the keys."""
    from etils import epath

    for walked in ("gs://bucket/data", "bucket/data"):
        tree = [(walked, ["cat"], []), (f"{walked}/cat", [], ["1.png"])]
        monkeypatch.setattr(type(epath.Path("gs://bucket/data")), "walk", lambda self, tree=tree: iter(tree))
        assert list(walk.walk_bucket(epath.Path("gs://bucket/data"))) == ["cat/1.png"]


def test_imagenets_tar_of_tars(tmp_path):
    inner = {f"n0{k}": tar_bytes({f"n0{k}_{i}.JPEG": encode((k, i, 0)) for i in range(3)}) for k in (2, 1)}
    (tmp_path / "train.tar").write_bytes(tar_bytes({f"{name}.tar": data for name, data in inner.items()}))
    source = ImageTar(tmp_path / "train.tar")
    assert source.class_names == ("n01", "n02")
    assert [source[i].key for i in (0, 5)] == ["n01/n01_0.JPEG", "n02/n02_2.JPEG"]
    assert (source[4].image == (2, 1, 0)).all() and source[4].label == 1


@pytest.mark.parametrize("cut", [0, 3, 100, 511, 512, 700, 1024, 2048, 5000, -1])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar of tars"])
def test_a_cut_archive_is_refused_by_name(tmp_path, kind, cut):
    files = {f"a/{i}.png": os.urandom(1000) for i in range(5)}
    if kind == "zip":
        data = write_zip(tmp_path / "x", files).read_bytes()
    else:
        data = tar_bytes(files if kind == "tar" else {"a.tar": tar_bytes(files), "b.tar": tar_bytes(files)})
        data = data.rstrip(b"\0") if cut == -1 else data
    path = tmp_path / f"data.{kind[:3]}"
    path.write_bytes(data[:cut])
    with pytest.raises(ValueError, match=rf"data\.{kind[:3]} is not a .* file, or is damaged or cut short"):
        open_source(str(path))


def test_a_damaged_tar_is_not_taken_for_a_shorter_one(tmp_path):
    data = bytearray(tar_bytes({f"a/{i}.png": bytes(600) for i in range(5)}))
    data[2 * 1536] ^= 0xFF  # in the third header
    (tmp_path / "data.tar").write_bytes(data)
    with pytest.raises(ValueError, match="damaged.*neither a header nor the end mark at byte 3,072"):
        ImageTar(tmp_path / "data.tar")


def test_a_compressed_tar_is_to_be_unpacked(tmp_path):
    for suffix in ("gz", "bz2", "xz"):
        path = tmp_path / f"data.tar.{suffix}"
        with tarfile.open(path, f"w:{suffix}") as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(ValueError, match=rf"data\.tar\.{suffix} is compressed \(.*unpack it"):
            open_source(str(path))


def test_a_damaged_member_of_an_archive_is_a_broken_image(tmp_path, monkeypatch):
    files = {"a/1.png": encode("red")[:16] + os.urandom(5000), "a/2.png": encode("red")}
    path = write_zip(tmp_path / "data.zip", files)
    data = bytearray(path.read_bytes())
    data[2000] ^= 0xFF
    path.write_bytes(data)
    source = ImageZip(path)
    with pytest.raises(BrokenImage, match=r"a/1.png: cannot be read: .*CRC-32"):
        source[0]
    assert source[1].key == "a/2.png"
    monkeypatch.setattr(decoding, "MAX_ENCODED_BYTES", 10)
    with pytest.raises(BrokenImage, match="a/2.png: .*more than 10"):
        source[1]
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(FileNotFoundError):  # a source that is out of reach is no broken image
        source[1]


def test_what_is_no_source_is_refused_with_the_choices(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no data at '/nowhere/x.zip'; allowed are .*tfds:NAME.*\.zip"):
        open_source("/nowhere/x.zip")
    with pytest.raises(FileNotFoundError, match="no data at ''"):
        open_source("")
    with pytest.raises(ValueError, match=r"data.npz is no source of images; allowed are"):
        open_source(str(tmp_path / "data.npz"))
    with pytest.raises(ValueError, match=r"no images in .*empty"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFolder(tmp_path / "data.npz")


def test_digits_are_a_source():
    source = open_source("digits", "eval")
    assert isinstance(source, Digits) and len(source) == 179
    image, label, key, _ = source[5]
    assert (image.shape, image.dtype, key, source.class_names[label]) == ((8, 8, 1), np.uint8, "5", str(label))
    assert source.fingerprint() != Digits("train").fingerprint()


@pytest.fixture
def lsun(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    folder = tmp_path / "church_outdoor_train_lmdb"
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        for i in range(40):
            transaction.put(b"%040x" % (1 << i), encode((i, 0, 0), (5, 6), "WEBP"))
        transaction.put(b"%040x" % (1 << 40), b"not WebP")
    return folder


def test_lsun_is_read_from_its_lmdb(lsun):
    source, again = open_source(str(lsun)), LSUN(lsun)  # LMDB itself refuses to open one folder twice
    assert (len(source), source.class_names) == (41, ())
    with ThreadPoolExecutor(8) as pool:
        for i, example in enumerate(pool.map(source.__getitem__, range(40))):
            assert (example.label, example.key, example.image.shape) == (0, f"{1 << i:040x}", (6, 5, 3))
            assert (example.image == (i, 0, 0)).all()
    with pytest.raises(BrokenImage, match=f"{1 << 40:040x}: not an image"):
        again[40]
    assert source.description == "lsun church_outdoor_train_lmdb" and source.fingerprint() == again.fingerprint()
    with pytest.raises(ValueError, match="leave the split empty"):
        open_source(str(lsun), "train")


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_damaged_lmdb_is_refused(lsun, size):
    data = (lsun / "data.mdb").read_bytes()
    (lsun / "data.mdb").write_bytes(data[:size])
    with pytest.raises(ValueError, match="church_outdoor_train_lmdb.*(damaged|cut short|no images)"):
        LSUN(lsun)


def write_tfds(data_dir, name, features, examples):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features(tfds.features)))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(examples), "test": self._generate_examples(examples[:2])}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    Builder.name = name
    tfds.disable_progress_bar()
    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


def test_tfds_is_read_without_tensorflow(tmp_path):
    path = write_tfds(
        tmp_path,
        "tiny",
        lambda f: {"image": f.Image(), "label": f.ClassLabel(names=["cat", "dog"]), "name": f.Text()},
        [{"image": io.BytesIO(encode((i, 0, 0))), "label": i % 2, "name": str(i)} for i in range(7)],
    )
    source, folder = TFDS("tiny", "train", tmp_path), open_source(str(path), "train[:3]")
    assert (len(source), len(folder), source.class_names) == (7, 3, ("cat", "dog"))
    with ThreadPoolExecutor(8) as pool:
        found = {int(e.image[0, 0, 0]): e.label for e in pool.map(source.__getitem__, range(7))}
    assert found == {i: i % 2 for i in range(7)} and source[6].image.shape == (3, 4, 3) and source[6].key == "6"
    assert source.description == "tfds tiny/1.0.0, split train"
    assert len({source.fingerprint(), folder.fingerprint(), open_source(str(path), "test").fingerprint()}) == 3
    with pytest.raises(ValueError, match="tfds tiny/1.0.0 has the splits train, test: choose one"):
        open_source(str(path))
    with pytest.raises(ValueError, match="tfds tiny/1.0.0: Unknown split 'val'.*its splits are"):
        open_source(str(path), "val")
    program = (
        "import sys; from diffussm_jax.data.sources import open_source; "
        "print(open_source(sys.argv[1], 'train')[0].image.shape, 'tensorflow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(3, 4, 3) False"


def test_tfds_pixels_may_be_a_tensor(tmp_path):
    path = write_tfds(
        tmp_path,
        "pixels",
        lambda f: {"x": f.Tensor(shape=(2, 2, 1), dtype=np.uint8), "z": f.Scalar(np.int64)},
        [{"x": np.full((2, 2, 1), i, np.uint8), "z": 5} for i in range(3)],
    )
    source = open_source(str(path), "train")
    assert source.class_names == () and sorted(int(source[i].image.max()) for i in range(3)) == [0, 1, 2]
    assert source[0].image.shape == (2, 2, 1) and source[0].label == 0


def test_tfds_says_what_it_lacks(tmp_path):
    path = write_tfds(tmp_path, "text", lambda f: {"text": f.Text()}, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match="tfds text/1.0.0 has no image among its features: .*'text'"):
        open_source(str(path), "train")
    with pytest.raises(ValueError, match="knows no data set 'no_such_data'") as error:
        TFDS("no_such_data", "train", tmp_path)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match=r"not prepared as array_record .*diffussm_jax\[prepare\].*array_record"):
        TFDS("cifar10", "train", tmp_path)
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"not prepared as array_record .*tfrecord.*diffussm_jax\[prepare\]"):
        open_source(str(path), "train")
    info.write_text("{ nonsense")
    with pytest.raises(ValueError, match="not prepared as array_record .*JSON"):
        open_source(str(path), "train")


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent")
    return str(SHARED / name)


def test_cifar10_as_a_zip():
    train, test = open_source(shared("cifar10_jpg.zip"), "train"), open_source(shared("cifar10_jpg.zip"), "test")
    assert (len(train), len(test)) == (25_000, 5_000)
    assert train.class_names == test.class_names and len(train.class_names) == 10
    assert (train[0].key, train[24_999].key) == ("train/airplane/0000.jpg", "train/truck/2499.jpg")
    assert (train[24_999].label, test[500].label, train.class_names[9]) == (9, 1, "truck")
    assert all(train[i].image.shape == (32, 32, 3) and train[i].image.dtype == np.uint8 for i in range(0, 25_000, 999))
    assert train.description == "zip cifar10_jpg.zip, split train"


def test_imagenet_as_a_zip():
    source = open_source(shared("imagenet_sample_256.zip"), "train")
    assert len(source) == len(source.class_names) == 250
    assert source[0].key == "train/n01440764/n01440764_tench.JPEG"
    assert all(source[i].image.shape == (256, 256, 3) and source[i].label == i for i in range(0, 250, 7))


def test_a_pipe_among_the_images_is_broken_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(BrokenImage, match="a.jpg: cannot be read: .*no regular file"):
        ImageFolder(tmp_path)[0]

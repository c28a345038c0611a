"""In random trees of folders and links, `walk` finds what an oracle finds by trying every name."""

import io
import os
import random
import re

import pytest
from PIL import Image

from diffussm_jax.data.images import BrokenImage
from diffussm_jax.data.sources import ImageFolder, open_source
from diffussm_jax.data.walk import is_hidden, walk

FOLDERS = ["a", "b", "é", "\n", "x y", "日本", "..a", "a.png", "-r", "\udcff\udcfe", "\u202e", "'\"", "\\", "*"]
FOLDERS += ["~", "gs:", "$HOME", " ", ".h", "__MACOSX", "z" * 200]  # \udcff is the byte ff, which is not UTF-8
FILES = ["1.png", "2.PNG", "ü.jpg", "\n.png", "\udcff.png", "-.gif", " .png", "a\\b.png", ".h.png", "n.txt", "x.tar"]
LINKS = ["folder", "folder", "folder", "file", "link", "dot", "dangling", "itself", "device"]
MODES = [0o000, 0o100, 0o400]  # none, only entered, only listed
SIZES = [300, pytest.param(2_000, marks=pytest.mark.slow)]


def encoded():
    file = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(file, "PNG")
    return file.getvalue()


PNG = encoded()


def make_tree(rng, root, num_links):
    """Makes folders in `root` and beside it, files in all but `root`, and links. Returns the number of links."""
    folders, files, links = [root, f"{root}_beside"], [], []
    os.makedirs(f"{root}/of_one_image")
    os.mkdir(f"{root}_beside")
    with open(f"{root}/of_one_image/1.png", "wb") as file:
        file.write(PNG)
    for _ in range(rng.randint(1, 10)):
        path = f"{rng.choice(folders)}/{rng.choice(FOLDERS)}"
        if not os.path.exists(path):
            os.mkdir(path)
            folders.append(path)
    for _ in range(rng.randint(1, 12)):
        path = f"{rng.choice(folders[1:])}/{rng.choice(FILES)}"
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.write(PNG)
            files.append(path)
    for _ in range(num_links):
        kind = rng.choice(LINKS)
        path = f"{rng.choice(folders if kind == 'folder' else folders[1:])}/{rng.choice(FOLDERS + FILES)}"
        target = {
            "folder": rng.choice(folders),
            "file": rng.choice(files or ["/nowhere"]),
            "link": rng.choice(links or ["/nowhere"]),
            "dot": rng.choice([".", "./."]),
            "dangling": "/nowhere/1.png",
            "itself": path,
            "device": "/dev/zero",
        }[kind]
        if not os.path.lexists(path):
            is_relative = target.startswith(root) and rng.random() < 0.5
            os.symlink(os.path.relpath(target, os.path.dirname(path)) if is_relative else target, path)
            links.append(path)
    if os.geteuid() and rng.random() < 0.3:  # root reads everything
        os.chmod(rng.choice(folders[1:]), rng.choice(MODES))
    return len(links)


def identity(path):
    return os.stat(path).st_dev, os.stat(path).st_ino


def visible(folder):
    """The paths in a folder that are not hidden and exist; none if it may not be listed."""
    try:
        paths = [f"{folder}/{name}" for name in os.listdir(folder) if not is_hidden(name)]
    except PermissionError:
        return []
    return [path for path in paths if os.path.exists(path)]


def reachable(folder, seen):
    """The identities of all files that can be reached by visible names. Each folder is read once."""
    if identity(folder) in seen:
        return set()
    seen.add(identity(folder))
    paths = visible(folder)
    found = {identity(path) for path in paths if not os.path.isdir(path)}
    return found.union(*(reachable(path, seen) for path in paths if os.path.isdir(path)))


def all_paths(folder, above=()):
    """The files on every path, or None if a path leads back to a folder above."""
    if identity(folder) in above:
        return None
    found = []
    for path in visible(folder):
        below = all_paths(path, (*above, identity(folder))) if os.path.isdir(path) else [path]
        if below is None:
            return None
        found += below
    return found


@pytest.mark.parametrize("num_trees", SIZES)
def test_what_is_found_is_what_can_be_reached(num_trees, tmp_path):
    kinds = {"without links": 0, "without circles": 0, "with circles": 0, "left out": 0}
    for seed in range(num_trees):
        rng, root = random.Random(seed), str(tmp_path / str(seed))
        num_links = make_tree(rng, root, rng.choice([0, 3, 6, 10]))
        left_out = {}
        names = list(walk(root, left_out))
        assert len(set(names)) == len(names) <= 14 * (2**num_links + 1), seed
        assert not any(is_hidden(part) for name in names for part in name.split("/")), seed
        assert {identity(f"{root}/{name}") for name in names} == reachable(root, set()), seed
        for path in (f"{root}/{name}" for name in left_out):
            assert os.path.lexists(path) or not os.access(os.path.dirname(path), os.X_OK), seed
            assert not os.path.exists(path) or not os.access(path, os.R_OK), seed
        if not num_links:
            plain = {f"{folder}/{name}" for folder, _, files in os.walk(root) for name in files}
            plain = {os.path.relpath(path, root) for path in plain if os.path.exists(path)}
            assert set(names) == {name for name in plain if not any(map(is_hidden, name.split("/")))}, seed
        on_every_path = all_paths(root)
        if on_every_path is not None:
            assert sorted(f"{root}/{name}" for name in names) == sorted(on_every_path), seed
        kinds["with circles" if on_every_path is None else "without circles" if num_links else "without links"] += 1
        kinds["left out"] += bool(left_out)
    assert all(count > num_trees / 10 for count in kinds.values()), kinds


def test_every_image_of_such_a_tree_is_read(tmp_path, capfd):
    for seed in range(30):
        root = str(tmp_path / f"\udcff{seed}\n")
        make_tree(random.Random(seed), root, 6)
        try:
            source = open_source(root)
        except ValueError as error:  # a link in `root` itself
            assert "is in no class folder, but other images are" in str(error), seed
            continue
        assert isinstance(source, ImageFolder) and len(source.fingerprint()) == 64
        for index, key in enumerate(source._keys):
            if os.path.isfile(f"{root}/{key}"):
                assert source[index].image.shape == (3, 2, 3) and source[index].key == key
            else:
                with pytest.raises(BrokenImage, match="it is no regular file"):
                    source[index]
        counts = re.findall(r": (\d+) left out: ", capfd.readouterr().err)
        assert sum(map(int, counts)) == source.num_left_out

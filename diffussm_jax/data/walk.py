"""The names of the files in a folder, whose links may lead in circles or nowhere, and a report of what is left out."""

import errno
import os
import stat
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

MAX_PATHS = 1000  # on which links may lead to one folder
# Errors that belong to one name of a folder. Others are of the disk or network.
_UNREACHABLE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)
_Identity = tuple[int, int]  # device and inode


class _Listing(NamedTuple):
    """What a folder holds, without hidden names."""

    files: list[str]
    folders: list[tuple[str, _Identity, bool]]  # name, identity, whether it is a link


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of the data."""
    return name.startswith(".") or name == "__MACOSX"


def print_left_out(path: epath.Path, left_out: Mapping[str, str]) -> None:
    """Prints to stderr how many names are left out for each reason, with the first name."""
    first = {}
    for name in sorted(left_out, reverse=True):
        first[left_out[name]] = name
    for reason, count in sorted(Counter(left_out.values()).items()):
        print(f"{path}: {count:,} left out: {reason}, such as {first[reason]!r}", file=sys.stderr, flush=True)


def walk_bucket(root: epath.Path) -> Iterator[str]:
    """Yields the relative names of all files below root."""
    start = os.fspath(root)
    for folder, _, names in root.walk():
        folder = os.fspath(folder)
        below = folder.split("://")[-1].removeprefix(start.split("://")[-1])  # some backends drop the scheme
        yield from (f"{below}/{name}".lstrip("/") for name in names)


def walk(start: str, left_out: dict[str, str]) -> Iterator[str]:
    """Yields the relative names of all files below a local folder.

    Links are followed on every path that leads to them, so several may share a folder. A link in a circle is followed
    after all other folders, and only to folders that were not read yet.

    Args:
      left_out: gets the names that cannot be reached, with the reasons.

    Raises:
      ValueError: links lead to a folder on more than `MAX_PATHS` paths.
      OSError: the disk or network fails, or `start` may not be listed.
    """
    listings = _list_folders(start, left_out)
    circle_of = _circles(listings)
    todo, closing = [(next(iter(listings)), "", False)], deque()
    num_paths = defaultdict(int)
    while todo or closing:
        folder, path, is_once = todo.pop() if todo else closing.popleft()
        if is_once and num_paths[folder]:
            continue
        num_paths[folder] += 1
        if num_paths[folder] > MAX_PATHS:
            raise ValueError(f"{start}: links lead to the folder {path!r} on more than {MAX_PATHS:,} paths")
        yield from (f"{path}{name}" for name in listings[folder].files)
        for name, below, is_link in listings[folder].folders:
            if below not in listings:
                continue
            if is_link:
                try:
                    os.stat(f"{start}/{path}{name}")
                except OSError as error:  # the system follows about 40 links in a row
                    _leave_out(left_out, f"{path}{name}", error)
                    continue
            is_closing = is_link and circle_of[below] == circle_of[folder]
            (closing if is_closing else todo).append((below, f"{path}{name}/", is_once or is_closing))


def _list_folders(start: str, left_out: dict[str, str]) -> dict[_Identity, _Listing]:
    """Lists every folder that can be reached once, `start` first."""
    listings, todo = {}, deque([(_identity(os.stat(start)), "")])
    while todo:
        folder, path = todo.popleft()
        if folder in listings:
            continue
        try:
            with os.scandir(f"{start}/{path}") as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
            is_open = os.access(f"{start}/{path}", os.X_OK)
        except OSError as error:
            if not path:
                raise
            _leave_out(left_out, path.rstrip("/"), error)
            continue
        listing = listings[folder] = _Listing([], [])
        for entry in entries:
            if is_hidden(entry.name):
                continue
            try:
                is_link = entry.is_symlink()
                if is_link or not is_open or entry.is_dir():
                    about = os.stat(entry.path)
                    if stat.S_ISDIR(about.st_mode):
                        listing.folders.append((entry.name, _identity(about), is_link))
                        continue
            except OSError as error:
                _leave_out(left_out, f"{path}{entry.name}", error)
                continue
            listing.files.append(entry.name)
        todo.extend((below, f"{path}{name}/") for name, below, _ in listing.folders)
    return listings


def _identity(about: os.stat_result) -> _Identity:
    return about.st_dev, about.st_ino


def _leave_out(left_out: dict[str, str], name: str, error: OSError) -> None:
    if error.errno not in _UNREACHABLE:
        raise error
    left_out[name] = error.strerror


def _circles(listings: Mapping[_Identity, _Listing]) -> dict[_Identity, int]:
    """A number for each folder. Folders have the same number if each can be reached from the other."""
    number = {folder: i for i, folder in enumerate(listings)}
    if not any(is_link for listing in listings.values() for _, _, is_link in listing.folders):
        return number
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = [
        (number[folder], number[below])
        for folder, listing in listings.items()
        for _, below, _ in listing.folders
        if below in number
    ]
    above, below = np.array(edges, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), (above, below)), (len(number), len(number)))
    _, circles = connected_components(graph, connection="strong")
    return dict(zip(number, circles.tolist(), strict=True))

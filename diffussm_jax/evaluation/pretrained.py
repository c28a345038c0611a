"""Published weights of the networks that scores are computed with: finding, reading and converting their files.

All formats of `tensor_files` give the same tensors, by the names of one published layout, and the same SHA-256.
`convert` writes them once as safetensors into the user's cache, where PyTorch is no longer needed.
"""

from pathlib import Path

from etils import epath

from diffussm_jax.io import cache_folder
from diffussm_jax.tensor_files import Published, Tensors, convert_weights, read_weights


def read_published(network: Published, path: epath.PathLike | None = None) -> tuple[Tensors, str]:
    """Reads the weights of a network.

    Args:
      network: `inception.PUBLISHED` or `dinov2.PUBLISHED`.
      path: a .pth, .safetensors or .npz file. By default the file that `convert` wrote.

    Returns:
      the tensors, float32, and the SHA-256 of their names, shapes and values, which does not depend on the format.

    Raises:
      FileNotFoundError: there is no such file. The message says where to get it.
      ValueError: the file is damaged, of an unknown format, needs PyTorch, or holds another network.
    """
    return read_weights(network, find_weights(network, path))


def find_weights(network: Published, path: epath.PathLike | None = None) -> epath.Path:
    """The file of a network's weights: the given one, or the one that `convert` wrote.

    Raises:
      FileNotFoundError: there is no such file. The message says where to get it.
    """
    found = epath.Path(path or converted_path(network))
    if found.is_file():
        return found
    missing = f"there is no file {found}" if path else f"the weights of {network.name} are not at {found}"
    raise FileNotFoundError(
        f"{missing}. Get {network.where}. Then pass it as --weights=FILE, or convert it once: "
        f"python -m diffussm_jax.evaluate --features={network.name} --convert=FILE"
    )


def convert(source: epath.PathLike, network: Published) -> Path:
    """Writes the weights of a network as safetensors into the user's cache, where `find_weights` finds them.

    Args:
      source: as `read_published`.
      network: `inception.PUBLISHED` or `dinov2.PUBLISHED`.

    Returns:
      The path of the file. Its metadata name the network, the source and the SHA-256 of both.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: as `read_published`.
    """
    path = converted_path(network)
    convert_weights(network, find_weights(network, source), path)
    return path


def converted_path(network: Published) -> Path:
    """Where `convert` writes, in `io.cache_folder`."""
    return cache_folder() / "weights" / f"{network.name}.safetensors"

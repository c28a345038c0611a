"""The card of a split of latents, card-SPLIT.json: how they were made, and the checksum of each shard."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from diffussm_jax.io import read_json

FORMAT_VERSION = 1
# What a card needs so that its latents can be read.
_CARD = {
    "num_records": int,
    "image_size": int,
    "latent_shape": list,
    "class_names": list,
    "vae": dict,
    "shards": list,
    "skipped": list,
}
_VAE = {"name": str, "encoder_sha256": str, "scaling_factor": int | float, "dtype": str}
_QUANTIZER = {"num_codes": int}  # vae.quantizer, of a `VQModel`
SHARD = {"file": str, "file_bytes": int, "num_records": int, "num_bytes": int, "sha256": str}
SKIPPED = {"index": int, "key": str, "reason": str}


def card_name(split: str) -> str:
    """The file name of a split's card."""
    return f"card-{split}.json"


def splits_in(folder: epath.Path) -> list[str]:
    """The names of the finished splits in a folder, sorted."""
    return sorted(path.name[len("card-") : -len(".json")] for path in folder.glob("card-*.json"))


def read_card(folder: epath.PathLike, split: str) -> dict:
    """Reads the card of a split.

    Raises:
      FileNotFoundError: the folder has no such split. The message lists its splits.
      ValueError: the card is damaged or of another format version.
    """
    folder = epath.Path(folder)
    path = folder / card_name(split)
    if not path.exists():
        found = f"it holds the splits {', '.join(splits_in(folder))}" if splits_in(folder) else "it holds none"
        raise FileNotFoundError(
            f"{folder} holds no finished latents of split {split!r}: there is no {path.name}; {found}. "
            "`python -m diffussm_jax.precompute` makes them."
        )
    card = read_json(path)
    if card.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a card of format version {FORMAT_VERSION}")
    _check_keys(card, path)
    return card


def wrong_keys(group: Any, kinds: Mapping[str, type]) -> list[str]:
    """The keys of `kinds` that a value read from JSON lacks, or has with another type. Whole numbers are of 63 bits."""

    def is_of(value, kind):
        return isinstance(value, kind) and not isinstance(value, bool) and (kind is not int or abs(value) < 2**63)

    return [key for key, kind in kinds.items() if not isinstance(group, dict) or not is_of(group.get(key), kind)]


def _check_keys(card: Mapping, path: epath.Path) -> None:
    """Raises ValueError if a key is missing or of another type, or the number of records is not that of the shards."""

    def check(group, kinds, where):
        if wrong := wrong_keys(group, kinds):
            raise ValueError(f"{path} is damaged: {where}{wrong[0]} is missing or of another type")

    check(card, _CARD, "")
    check(card["vae"], _VAE, "vae.")
    if "quantizer" in card["vae"]:
        check(card["vae"]["quantizer"], _QUANTIZER, "vae.quantizer.")
    for i, shard in enumerate(card["shards"]):
        check(shard, SHARD, f"shards[{i}].")
    for i, item in enumerate(card["skipped"]):
        check(item, SKIPPED, f"skipped[{i}].")
    in_shards = sum(shard["num_records"] for shard in card["shards"])
    if card["num_records"] != in_shards:
        raise ValueError(f"{path} is damaged: num_records is {card['num_records']}, its shards hold {in_shards}")
    shape = card["latent_shape"]
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{path} is damaged: latent_shape is {shape}, and must be [H, W, C]")


def about_quantizer(num_codes: int | None) -> dict:
    """What `vae` in a card says of a `VQModel` beside what it says of every autoencoder; {} for None, no quantizer."""
    return {} if num_codes is None else {"quantizer": {"num_codes": num_codes}}


def check_quantizer(card: Mapping, num_codes: int | None, name: str) -> None:
    """Checks that an autoencoder has the quantizer of the one that made the latents, or likewise none.

    Args:
      num_codes: of the codebook of the autoencoder; None without one.
      name: of the autoencoder, for the message.

    Raises:
      ValueError: it does not. The message has both.
    """

    def kind(quantizer):
        return f"a VQModel of {quantizer['num_codes']} codes" if quantizer else "an AutoencoderKL"

    ours, its = card["vae"].get("quantizer"), about_quantizer(num_codes).get("quantizer")
    if ours != its:
        raise ValueError(
            f"the autoencoder {name} is {kind(its)}, but the latents were made by {kind(ours)}, {card['vae']['name']}"
        )


def data_values(card: Mapping) -> dict[str, int | float]:
    """What the keys of `config.data` are for the latents of a card."""
    H, _, C = card["latent_shape"]
    return {
        "image_size": card["image_size"],
        "num_channels": C,
        "downsampling": card["image_size"] // H,
        "scaling_factor": card["vae"]["scaling_factor"],
        "num_classes": len(card["class_names"]),
    }


def check_card(card: Mapping, data: Mapping, path: str) -> None:
    """Raises a ValueError with each key and both values if a card does not match `config.data`."""
    expected = data_values(card)
    if not data["num_classes"]:  # an unconditional model passes over the labels
        del expected["num_classes"]
    wrong = [f"config.data.{k} = {data[k]}, the card has {v}" for k, v in expected.items() if data[k] != v]
    if wrong:
        raise ValueError(f"the latents of {path} do not match the config: " + "; ".join(wrong))

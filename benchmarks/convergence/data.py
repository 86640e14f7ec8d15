"""Real data, by name: from `$MECHANIC_DATA` if it is there, else downloaded once, and checked in either case.

A file is known by the SHA-256 of its content, unzipped if it ends in `.gz`: mirrors compress the same images again.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import torch
from sklearn.datasets import fetch_california_housing, load_svmlight_file
from torch import Tensor

LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets"
URLS = {  # beginnings of paths
    "fashion-mnist/": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "libsvm/german.numer_scale": f"{LIBSVM}/binary/german.numer_scale",
    "libsvm/mushrooms": f"{LIBSVM}/binary/mushrooms",
    "libsvm/sensorless2200.scale": None,  # rows that someone has drawn from Sensorless
    "libsvm/": f"{LIBSVM}/multiclass/",
    "mnist/": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "names/": "https://raw.githubusercontent.com/karpathy/makemore/master/",
    "sst2/": "https://raw.githubusercontent.com/clairett/pytorch-sentiment-classification/master/data/SST2/",
    "tinyshakespeare/": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    "usps/usps.bz2": f"{LIBSVM}/multiclass/usps.bz2",
}
HOUSING = "california-housing/fetch_california_housing.csv"
SHA256 = {
    HOUSING: "23a00dc5b1f56ed2ea801942b2e4148dcafa949358e57c9d8e326416eae7e2b3",
    "fashion-mnist/t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "fashion-mnist/train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "libsvm/dna.scale": "03d39477c5e48415e9cd18e006efc8f7a3b5c3deaee8289a72511c35070e3cfe",
    "libsvm/german.numer_scale": "97637cc6b994bd3fa78999c771bc044bea7a0cdf91d43b6ecfd10f7e7c4ebc82",
    "libsvm/glass.scale": "7c847cf67bc3dceda40890c37044cc569b2603c2ca4508e01faeaa0d521e52e5",
    "libsvm/iris.scale": "65562a5b134c670095ffa5eacf64706047a07a558114c3668a86f9b2144212e8",
    "libsvm/letter.scale": "ce2c7df15cc5742dc4382d59079181c97c21e0beaa0af53c84cc5745c69f1020",
    "libsvm/mushrooms": "f39a4eb628dc61a7d43760815b061c9e497aa728ce1ad8bde57a09ef6043b538",
    "libsvm/pendigits": "6e8a2f318a24d97d26a9c381642621dc955fed73ec44c4d417bd7afbb47ed67c",
    "libsvm/satimage.scale": "b7150252d3117712588d9d5dfeb1a409234340313a93b458f66449a2678d5542",
    "libsvm/segment.scale": "7c25c4529b8c84d047bc546e1e1f9a3f671c36d77f5469fb845b6e4a15bdd629",
    "libsvm/sensorless2200.scale": "5b6f5ae0462219292cf5271f36787c0778bf54579f36c1c3e0a2734b093e9bc8",
    "libsvm/svmguide2": "0fe7841f13956623ddc432528311453ab5bf9611c827f95b0b5fd1244ff15057",
    "libsvm/vehicle.scale": "f5bcfc5545c0f674b372e8dc3e41752efa287d4e04cb920150c51cd9c3df7b86",
    "libsvm/vowel.scale": "89ecbd4590cabc23b001cbd2d90128efe3c8ad02540ce1a08ef367b98d765585",
    "libsvm/wine.scale": "36c20cc5a687694cce444e01c0cc6d2957ab73fbdea7ba33aae414f86183e927",
    "mnist/t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "mnist/train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "names/names.txt": "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    "sst2/dev.tsv": "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359",
    "sst2/test.tsv": "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
    "sst2/train.tsv": "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
    "tinyshakespeare/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "usps/usps.npz": "499e6a8037eb214a5657cc1b4b5ca3f3b48d929bfa63c9cda57fcd35f52cc947",
}
# Two files are not what the public homes offer. `usps.npz` holds the features of LIBSVM's `usps.bz2`, in [-1, 1], as
# bytes; the archive's checksum, MD5, is the one torchvision knows. scikit-learn fetches the housing data, and checks.
USPS_MD5 = "ec16c51db3855ca6c91edd34d0e9b197"

Split = tuple[Tensor, Tensor, Tensor, Tensor]


class DataError(RuntimeError):
    """A file that is missing or is not what it should be."""


def cache() -> Path:
    """Return the directory for downloads and for weights that were trained before."""
    return Path(pooch.os_cache("mechanic-pytorch"))


def at_hand(path: str) -> Path | None:
    """Return the file in `$MECHANIC_DATA`, if it is there."""
    folder = os.environ.get("MECHANIC_DATA")
    file = Path(folder, path) if folder else None
    return file if file and file.exists() else None


def address(path: str) -> str | None:
    """Return where a file is public, None if nowhere."""
    beginning = max((known for known in URLS if path.startswith(known)), key=len, default=None)
    url = URLS[beginning] if beginning else None
    return url + path.rpartition("/")[2] if url and url.endswith("/") else url


def is_available(path: str) -> bool:
    """Return True if a file is at hand or public."""
    return at_hand(path) is not None or address(path) is not None


def fetch(path: str) -> Path:
    """Return a file that has been checked, downloaded with a progress bar unless it is there.

    Raises:
        DataError: it is not there and cannot be had, or its content is not the known one.
    """
    file, url = at_hand(path), address(path)
    if file is None:
        if url is None:
            raise DataError(f"{path}: not public. Remedy: put it into the directory $MECHANIC_DATA.")
        target = cache() / path
        try:
            arguments: dict[str, Any] = {"known_hash": f"md5:{USPS_MD5}" if path.endswith(".bz2") else None}
            file = Path(pooch.retrieve(url, fname=target.name, path=target.parent, progressbar=True, **arguments))
        except Exception as error:
            raise DataError(
                f"{path}: cannot be had from {url} ({error}). Remedy: try again, or put the file into the directory "
                "$MECHANIC_DATA."
            ) from error
    if path in SHA256 and (found := content_hash(file)) != SHA256[path]:
        raise DataError(
            f"{file}: SHA-256 of its content must be {SHA256[path]}. Got {found}. Remedy: delete it and run again; if "
            f"that does not help, {url or 'its home'} has changed: get the file elsewhere and put it into "
            "the directory $MECHANIC_DATA."
        )
    return file


def content_hash(file: Path) -> str:
    """Return the SHA-256 of what is in a file, unzipped."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        return f"no content ({error})"
    return hashlib.sha256(content).hexdigest()


def split(x: Tensor, y: Tensor, test: float = 0.1) -> Split:
    """Return rows in an order that is always the same, the last ones for testing."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, rest = order[: len(x) - int(test * len(x))], order[len(x) - int(test * len(x)) :]
    return x[train], y[train], x[rest], y[rest]


@lru_cache
def libsvm(path: str) -> tuple[Tensor, Tensor]:
    """Return features and classes from 0 on."""
    x, y = load_svmlight_file(str(fetch(path)))
    return torch.tensor(x.toarray(), dtype=torch.float32), torch.tensor(np.unique(y, return_inverse=True)[1])


@lru_cache
def usps() -> tuple[Tensor, Tensor]:
    """Return 16 x 16 images as features in [-1, 1], and classes."""
    if (file := at_hand("usps/usps.npz")) is None:
        x, y = load_svmlight_file(str(fetch("usps/usps.bz2")))
        images, labels = ((x.toarray() + 1) / 2 * 255).astype("uint8"), y - 1
    else:
        fetch("usps/usps.npz")
        with np.load(file) as arrays:
            images, labels = arrays["x_train"], arrays["y_train"]
    return torch.tensor(images.reshape(len(images), -1) / 127.5 - 1).float(), torch.tensor(labels).long()


@lru_cache
def images(folder: str) -> Split:
    """Return images of shape (1, 28, 28), as bytes to save memory, and classes, of MNIST or Fashion-MNIST."""

    def idx(name: str, header: int) -> Tensor:
        content = gzip.decompress(fetch(f"{folder}/{name}-ubyte.gz").read_bytes())
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)

    parts = []
    for part in ("train", "t10k"):
        x, y = idx(f"{part}-images-idx3", 16), idx(f"{part}-labels-idx1", 8)
        parts += [x.view(-1, 1, 28, 28), y.long()]
    x, y, x_test, y_test = parts
    return x, y, x_test, y_test


@lru_cache
def shakespeare(context: int) -> Split:
    """Return pieces of text as numbers of characters, and the same pieces moved on by one."""
    text = fetch("tinyshakespeare/input.txt").read_text(encoding="utf-8")
    numbers = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([numbers[c] for c in text])
    x, y = (part[: len(part) // context * context].view(-1, context) for part in (data[:-1], data[1:]))
    cut = len(x) * 9 // 10
    return x[:cut], y[:cut], x[cut:], y[cut:]


@lru_cache
def names() -> Split:
    """Return names as numbers of letters, 0 at either end; what follows the end is -100 in the targets."""
    lines = fetch("names/names.txt").read_text(encoding="utf-8").split()
    x = torch.zeros(len(lines), max(map(len, lines)) + 1, dtype=torch.long)
    y = torch.full_like(x, -100)
    for i, name in enumerate(lines):
        letters = torch.tensor([ord(c) - ord("a") + 1 for c in name])
        x[i, 1 : len(name) + 1], y[i, : len(name)], y[i, len(name)] = letters, letters, 0
    return split(x, y)


@lru_cache
def housing() -> Split:
    """Return features and prices of Californian districts, standardised."""
    if at_hand(HOUSING) is None:
        x, y = fetch_california_housing(data_home=cache(), return_X_y=True)
        table = np.column_stack([x, y])
    else:
        table = np.loadtxt(fetch(HOUSING), delimiter=",", skiprows=1)
    data = torch.tensor((table - table.mean(0)) / table.std(0), dtype=torch.float32)
    return split(data[:, :-1], data[:, -1:])

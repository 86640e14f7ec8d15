"""The four files of MNIST, or of Fashion-MNIST, of scikit-learn's digits: the tests need no download."""

import gzip

import numpy as np
from sklearn.datasets import load_digits


def write_digits_as_mnist(folder):
    """Write them into a directory."""
    images, labels = load_digits(return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8) * (255 / 16), np.ones((3, 3))).astype(np.uint8)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    for part, which in {"train": slice(0, 1437), "t10k": slice(1437, None)}.items():
        for name, array in {"images": images[which], "labels": labels[which].astype(np.uint8)}.items():
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            data = gzip.compress(header + array.tobytes(), compresslevel=1)
            (folder / f"{part}-{name}-idx{array.ndim}-ubyte.gz").write_bytes(data)

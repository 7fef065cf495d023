"""Data sets by name: scikit-learn's digits, torchvision's data sets, and the Hugging Face Hub."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from samplerbench.data.image_set import DataSource, ImageSet
from samplerbench.data.resize import ResizedSource
from samplerbench.errors import UserError
from samplerbench.options import did_you_mean, option
from samplerbench.text import is_unicode
from samplerbench.untrusted import reason, user_path

ROOT_VARIABLE = "SAMPLERBENCH_DATA"


@dataclass(frozen=True)
class Digits(DataSource):
    """scikit-learn's 1,797 real 8x8 digits (UCI test set of optical recognition of handwritten digits).

    The 17 grey levels 0 … 16 are scaled to 0 … 255. The data set is installed with scikit-learn. Every fifth image of
    each digit is held out: `train` has 1,442 images and `held-out` has 355.
    """

    split: Literal["all", "train", "held-out"] = option("all", "split of the data set")

    def load(self) -> ImageSet:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(bunch.target.astype(np.int64))
        if self.split != "all":
            held_out = torch.zeros(len(labels), dtype=torch.bool)
            for digit in range(10):
                held_out[(labels == digit).nonzero()[4::5, 0]] = True
            chosen = held_out if self.split == "held-out" else ~held_out
            images, labels = images[chosen], labels[chosen]
        return ImageSet(
            name="digits",
            split=self.split,
            images=images,
            labels=labels,
            classes=10,
            licence="CC BY 4.0 (UCI Machine Learning Repository: Alpaydin & Kaynak 1998)",
            source="digits" if self.split == "all" else f"digits:split={self.split}",
            grey_levels=17,
        )


@dataclass(frozen=True)
class TorchvisionSet(DataSource):
    """Base class of torchvision's data sets. Files are downloaded only with `download=true`."""

    torchvision_name: ClassVar[str]
    licence: ClassVar[str] = ""

    split: Literal["train", "test"] = option("train", "split of the data set")
    root: str = option("", f"folder of torchvision's files; default: ${ROOT_VARIABLE}, or the cache of samplerbench")
    download: bool = option(False, "download missing files")

    def load(self) -> ImageSet:
        import torchvision.datasets as sets

        folder = data_root(self.root)
        cls = getattr(sets, self.torchvision_name)
        try:
            found = cls(str(folder), **self._part(), download=self.download)
        except Exception as error:  # for files that are missing, damaged or of another data set
            if self.download:
                raise UserError(f"{self.label()} cannot be downloaded to {folder}: {reason(error)}") from None
            raise UserError(
                f"{self.label()} ({self.split}) is not in {folder}; name the folder that holds torchvision's files "
                f"with {self.label()}:root=FOLDER or ${ROOT_VARIABLE}, or fetch them with {self.label()}:download=true."
            ) from None
        images = torch.as_tensor(np.asarray(found.data))
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] in (1, 3):
            images = images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(found.targets if hasattr(found, "targets") else found.labels, dtype=torch.int64)
        classes = int(labels.max()) + 1
        return ImageSet(
            name=self.label(),
            split=self.split,
            images=images.contiguous(),
            labels=labels,
            classes=classes,
            licence=self.licence,
            source=f"{self.label()}:split={self.split}",
            class_names=_class_names(getattr(found, "classes", ()), classes),
        )

    def available(self) -> bool:
        """Whether the files are there and complete. Nothing is downloaded."""
        try:
            replace(self, download=False).load()
        except UserError:
            return False
        return True

    def _part(self) -> dict[str, Any]:
        return {"train": self.split == "train"}


class MNIST(TorchvisionSet):
    """MNIST: 60,000 and 10,000 grey 28x28 handwritten digits (LeCun et al. 1998)."""

    torchvision_name = "MNIST"
    licence = "CC BY-SA 3.0 (LeCun, Cortes & Burges)"


class FashionMNIST(TorchvisionSet):
    """Fashion-MNIST: 60,000 and 10,000 grey 28x28 pictures of clothes (Xiao et al. 2017)."""

    torchvision_name = "FashionMNIST"
    licence = "MIT (Zalando SE)"


class KMNIST(TorchvisionSet):
    """Kuzushiji-MNIST: 60,000 and 10,000 grey 28x28 cursive characters (Clanuwat et al. 2018)."""

    torchvision_name = "KMNIST"
    licence = "CC BY-SA 4.0 (CODH)"


class CIFAR10(TorchvisionSet):
    """CIFAR-10: 50,000 and 10,000 32x32 photographs in 10 classes (Krizhevsky 2009)."""

    torchvision_name = "CIFAR10"


class CIFAR100(TorchvisionSet):
    """CIFAR-100: 50,000 and 10,000 32x32 photographs in 100 classes (Krizhevsky 2009)."""

    torchvision_name = "CIFAR100"


class SVHN(TorchvisionSet):
    """SVHN: 73,257 and 26,032 32x32 photographs of house numbers (Netzer et al. 2011)."""

    torchvision_name = "SVHN"

    def _part(self) -> dict[str, Any]:
        return {"split": self.split}


@dataclass(frozen=True)
class HubDataset(ResizedSource):
    """An image data set of the Hugging Face Hub, or a folder that `datasets` loads. Requires the library `datasets`."""

    id: str = option("", "owner/name on the Hub, or a local folder", positional=True)
    split: str = option("train", "split of the data set, such as `test` or `train[:1000]`")
    images: str = option("", "column of the images; default: the only column of this type")
    labels: str = option("", "column of the class labels; default: the only column of this type, if any")
    config: str = option("", "configuration, if the data set has several")
    revision: str = option("", "commit or tag")

    def load(self) -> ImageSet:
        try:
            import datasets
        except ImportError:
            raise UserError(f"{self.spec} needs the library datasets: pip install datasets.") from None
        if not self.id:
            raise UserError("name the data set: hf:owner/name.")
        try:
            found = datasets.load_dataset(
                self.id,
                self.config or None,
                split=self.split,
                revision=self.revision or None,
                trust_remote_code=False,  # has no effect since datasets 4
            )
        except Exception as error:  # datasets lets through whatever its loaders and the network raise
            why = str(error).strip().split("\n")[0]
            raise UserError(f"the data set {self.id} cannot be loaded ({type(error).__name__}: {why}).") from None
        image = self._column(found.features, datasets.Image, self.images, "images")
        label = self._column(found.features, datasets.ClassLabel, self.labels, "labels")
        if image is None:
            raise UserError(f"the data set {self.id} has no column of images; it has {', '.join(found.features)}.")
        from samplerbench.data.files import stack_images

        # Read files, not decoded images: samplerbench restricts the formats, and names a damaged file.
        try:
            plain = found.cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # a column of another type
            raise UserError(f"the data set {self.id}: {image} is not a column of images ({reason(error)}).") from None
        named = ((f"{self.id}[{i}]", _stream(row)) for i, row in enumerate(plain[image]))
        images = stack_images(named, self)
        labels = None if label is None else self._labels(found[label])
        classes = None if labels is None else int(getattr(found.features[label], "num_classes", labels.max() + 1))
        return ImageSet(
            name=self.id,
            split=self.split,
            images=images,
            labels=labels,
            classes=classes,
            licence=str(found.info.license or ""),
            source=self.spec,
            resized=self.rule,
            class_names=() if label is None else _class_names(getattr(found.features[label], "names", ()), classes),
        )

    def _labels(self, values: Any) -> Tensor:
        try:
            return torch.tensor(list(values), dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"the data set {self.id}: its labels are not integers ({reason(error)}).") from None

    def _column(self, features: Any, of: type, named: str, what: str) -> str | None:
        if named:
            if named not in features:
                raise UserError(
                    f'the data set {self.id} has no column "{named}".{did_you_mean(named, features)} '
                    f"Columns: {', '.join(features)}."
                )
            return named
        fitting = [name for name, feature in features.items() if isinstance(feature, of)]
        if len(fitting) > 1:
            raise UserError(
                f"the data set {self.id} has several columns of {what} ({', '.join(fitting)}); choose with {what}=NAME."
            )
        return fitting[0] if fitting else None


def _class_names(names: Any, classes: int | None) -> tuple[str, ...]:
    """The class names of a library's data set; empty unless there is one for each class.

    MNIST of torchvision has the names "0 - zero", "1 - one", …: the number is removed.

    Args:
        names: the names, in the order of the labels. None if the data set has no names.
        classes: number of classes.
    """
    named = [str(name) for name in names or ()]
    if len(named) != classes:
        return ()
    return tuple(name.removeprefix(f"{k} - ") if is_unicode(name) else "" for k, name in enumerate(named))


def _stream(row: Any) -> Any:
    """The file of one row of an undecoded image column: its bytes, or the local file that it names."""
    data, path = (row or {}).get("bytes"), (row or {}).get("path")
    if data is not None:
        return io.BytesIO(data)
    return Path(path) if path else io.BytesIO()


def data_root(folder: str = "") -> Path:
    """The folder of torchvision's files: `folder`, else $SAMPLERBENCH_DATA, else a folder in the user's cache."""
    from samplerbench.cache import cache_dir

    named = folder or os.environ.get(ROOT_VARIABLE, "")
    return user_path(named) if named else cache_dir() / "data"

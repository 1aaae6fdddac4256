"""Makes a training run's batches of labeled images, and of unlabeled images for the consistency term."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crqat.train import distributed, shares
from crqat.train.config import DataConfig, OptimizerConfig
from crqat.train.data import sources
from crqat.train.data.batches import Batches, Images, subset
from crqat.train.data.dataset import Dataset
from crqat.train.data.split import Split
from crqat.train.training.evaluate import answers


@dataclass(frozen=True)
class TrainingImages:
    """Labeled and unlabeled images of one training run.

    Attributes:
        config: The recipe's `data` section.
        dataset: The data set of the recipe.
        split: Indices of the data set's training images by use: training, validation, unlabeled, or reserved for
            `crqat advise`.
        device: Device of the training.
    """

    config: DataConfig
    dataset: Dataset
    split: Split
    device: torch.device

    def labeled(self, section: OptimizerConfig, key: str, strong: bool) -> Batches:
        """Return batches of the training images with their labels.

        Args:
            section: Section of the recipe that has the batch size.
            key: Name of the section in the recipe; used in messages.
            strong: Whether the student gets strongly augmented views.

        Raises:
            UsageError: The batch size does not fit the images or the processes.
        """
        images, labels = (
            subset(self.dataset.train_images, self.split.train),
            self.dataset.train_labels[self.split.train],
        )
        return self._batches(images, labels, section.batch_size, strong, f"{key}, of {len(images)} images")

    def unlabeled(self, section: OptimizerConfig, strong: bool, labeler: nn.Module | None) -> Batches | None:
        """Return batches of unlabeled images, or of images pseudo-labeled by `labeler`; None if there are none."""
        config, images = self.config, self.without_labels
        size = round(config.unlabeled_ratio * section.batch_size)
        if size == 0 or len(images) == 0:
            return None
        labels = torch.zeros(len(images), dtype=torch.int64)
        if labeler is not None:
            labels = answers(labeler, images, self.dataset.preprocessing, self.device)
        key = f"data.unlabeled_ratio times batch_size, of {len(images)} unlabeled images"
        return self._batches(images, labels, size, strong, key)

    def _batches(self, images: Images, labels: Tensor, size: int, strong: bool, key: str) -> Batches:
        padding, flip = self.config.crop_padding, self.config.flip
        batches = Batches(images, labels, self.dataset.preprocessing, size, padding, flip, self.device, strong)
        shares.check_batch(batches.batch_size, key, distributed.world())
        return batches

    @functools.cached_property
    def without_labels(self) -> Images:
        """Return the images that the consistency term uses without labels; see `data.labeled` and `data.unlabeled`."""
        config, images = self.config, self.dataset.train_images
        if config.unlabeled is None:
            return subset(images, self.split.unlabeled)
        if config.unlabeled == config.source and config.unlabeled_root is None:
            # From the labeled source, take all images except those for validation, which stay unseen.
            return subset(images, torch.cat([self.split.train, self.split.unlabeled]))
        with distributed.first_rank_first():
            return sources.load_unlabeled(config.unlabeled, config, self.dataset)

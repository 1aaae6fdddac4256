"""Runs the epochs and steps of training; the float network, QAT and CR-QAT are trained by the same step function.

Features of low-bit training are callbacks; see `crqat.train.training.callbacks`. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from crqat.train import distributed
from crqat.train.training.callbacks import Callback
from crqat.train.training.consistency import ConsistencyTraining, consistency_loss
from crqat.train.training.optimizer import Fit
from crqat.train.training.resume import Keeper, Training

# Called with all rows of the history so far: when a training run starts or resumes, and after each epoch.
Track = Callable[[Sequence[Mapping[str, Any]]], None]


def step(
    views: Sequence[Tensor],
    labels: Tensor,
    networks: ConsistencyTraining,
    fit: Fit,
    callbacks: Sequence[Callback] = (),
    pseudo_labels: Tensor | None = None,
) -> None:
    """Run one training step: compute loss and gradient, and update the network and its teacher.

    Args:
        views: `networks.views` augmentations, float32 of shape [N, C, H, W] each; the first B images are labeled.
        labels: Classes of the labeled images, int64 of shape [B].
        networks: The network that is trained, and its teacher.
        fit: The optimizer and the learning rate.
        callbacks: Features of low-bit training, called in this order.
        pseudo_labels: Classes that the float network gave the unlabeled images, int64; None without pseudo-labels.
    """
    for callback in callbacks:
        callback.before_step(fit)
    with fit.autocast():
        loss = objective(views, labels, networks, networks.weight(fit.steps_done, fit.steps), pseudo_labels)
        for callback in callbacks:
            loss = callback.add_to_loss(loss, fit)
    update(fit, loss)
    networks.update_teacher(fit.steps_done - 1)
    for callback in callbacks:
        callback.after_step(fit)


def objective(
    views: Sequence[Tensor],
    labels: Tensor,
    networks: ConsistencyTraining,
    weight: float,
    pseudo_labels: Tensor | None = None,
) -> Tensor:
    """Return the loss of a training step: cross-entropy of labeled images + `weight` times consistency of all images.

    With `pseudo_labels`, the second term is the cross-entropy of the unlabeled images.
    """
    logits = networks.student(views[0])
    loss = functional.cross_entropy(logits[: len(labels)], labels)
    if pseudo_labels is not None:
        return loss + weight * functional.cross_entropy(logits[len(labels) :], pseudo_labels)
    if networks.views == 1:
        return loss
    target = networks.target(views[1])
    return loss + weight * consistency_loss(logits, target, networks.config.temperature)


def update(fit: Fit, loss: Tensor) -> None:
    """Run the backward pass of a scalar loss, set the learning rate and step the optimizer."""
    fit.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    fit.set_learning_rate()
    fit.optimizer.step()
    distributed.average_statistics(fit.model)
    fit.count(loss)


def epochs(
    training: Training,
    networks: ConsistencyTraining,
    callbacks: Sequence[Callback],
    keeper: Keeper,
    measure: Callable[[], dict[str, float]],
    track: Track | None = None,
) -> None:
    """Run all epochs of a training run, or the remaining ones after an interruption; each adds a row of history.

    Args:
        training: State that is saved and resumed. Its feed "images" gives the batches; a feed "unlabeled" gives further
            images for the consistency term, with pseudo-labels if `networks.pseudo_labels`, otherwise without labels.
        networks: The network that is trained, and its teacher.
        callbacks: Features of low-bit training, called in this order.
        keeper: Saves and resumes the training run.
        measure: Returns what the history records for an epoch in addition to the loss.
        track: Called with the history once the state that it describes is saved.
    """
    fit, unlabeled = training.fit, training.feeds.get("unlabeled")
    further = None if unlabeled is None else unlabeled.stream()
    with keeper.keep(training):
        for callback in callbacks:
            callback.on_start(fit)
        if track is not None:
            track(training.history)
        for epoch in fit.epochs():
            fit.model.train()
            for *views, labels in training.feeds["images"].epoch():
                pseudo_labels = None
                if further is not None:
                    *others, given = next(further)
                    views = [torch.cat(pair) for pair in zip(views, others, strict=True)]
                    pseudo_labels = given if networks.pseudo_labels else None
                step(views, labels, networks, fit, callbacks, pseudo_labels)
                keeper.after_step()
            for callback in callbacks:
                callback.on_epoch_end(fit)
            training.history.append(fit.end_of_epoch(epoch, **measure()))
            keeper.save()
            if track is not None:
                track(training.history)

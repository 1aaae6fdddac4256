"""A Lightning module that trains a quantized network with a teacher; the Trainer's own features stay as they are.

    module = QuantizedClassifier(net, calibration=train_loader, steps=len(train_loader) * epochs)
    lightning.Trainer(max_epochs=epochs).fit(module, train_loader)
    crqat.export(module.teacher.model, "int8", images=held_out, preprocessing=crqat.Preprocessing(mean, std))

`train_loader` gives (strongly changed images, weakly changed images, labels), or (images, labels).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import crqat


class QuantizedClassifier(LightningModule):
    """A quantized classifier and the exponential moving average of it that teaches it.

    Args:
        net: Float network, trained.
        calibration: Batches of normalized images, float32 of shape [N, C, H, W], or tuples that begin with them.
        steps: Of the whole training, for the learning rate.
        lr: Peak learning rate.
        weight_decay: Of convolution and linear weights.
        consistency: What the consistency term counts beside the cross entropy.
    """

    def __init__(
        self,
        net: nn.Module,
        calibration: Iterable[Any],
        steps: int,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        consistency: float = 1.0,
    ) -> None:
        super().__init__()
        # A Trainer leaves the mode as it is, and a network that was just quantized is in eval mode.
        self.model = crqat.quantize(net, calibration=calibration, weights=4, activations=4).train()
        self.steps, self.lr, self.weight_decay, self.consistency = steps, lr, weight_decay, consistency
        self.teacher: crqat.EMATeacher | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalized images."""
        return self.model(images)

    def on_fit_start(self) -> None:
        """Make the teacher where the network is by now: on the Trainer's device."""
        self.teacher = crqat.EMATeacher(self.model, decay=0.99)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of one step."""
        *views, labels = batch
        logits = self.model(views[0])
        return F.cross_entropy(logits, labels) + self.consistency * crqat.consistency_loss(
            logits, self.teacher(views[-1])
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the teacher, behind the optimizer's step."""
        self.teacher.update()

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD whose learning rate follows a cosine."""
        groups = crqat.parameter_groups(self.model, weight_decay=self.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

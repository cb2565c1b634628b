"""When a training is validated."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.handlers import ValidationHandler


class ValidateEpochs(ValidationHandler):
    """Handler: MONAI's, and the last epoch is validated whatever the interval, so that no run ends without a score.

    Args:
        interval: epochs from one validation to the next.
        validator: the evaluator.
    """

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""

        def is_due(trainer: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == trainer.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=is_due), self)

"""The held-out measurement of one trainee."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from sparsepilot.metrics.firing import FiringDensity
from sparsepilot.metrics.fvu import FVU
from sparsepilot.metrics.l0 import L0
from sparsepilot.metrics.mse import MSE
from sparsepilot.metrics.recovery import DictionaryRecovery
from sparsepilot.training.trainee import Trainee

Row = dict[str, float | int | list[int]]


class CrossEntropy(Protocol):
    """What `Validation` needs of `lm.splice.SplicedCrossEntropy`, which says what the figures mean."""

    def measure(
        self,
        reconstruct: Callable[[Tensor], Tensor],
        *,
        often: bool = False,
        correction: float = 1.0,
        last: bool = False,
        device: torch.device | None = None,
    ) -> dict[str, float]:
        """Figures by name, equal on all ranks; where not `often`, with the `correction` of those made often."""


class Validation(nn.Module):
    """Runs the metrics over the validation rows; nothing here moves the trainee's own state.

    Args:
        trainee: what is measured.
        rows_per_pass: training rows of the cache; a latent is *silent* when it fired neither in the last so many
            training samples nor on any validation row.
        planted_TD: [T, D] the true features, where the data has them.
        cross_entropy: of the language model with the reconstruction spliced in; None leaves it out.
    """

    def __init__(
        self,
        trainee: Trainee,
        rows_per_pass: int,
        planted_TD: Tensor | None = None,
        cross_entropy: CrossEntropy | None = None,
    ) -> None:
        super().__init__()
        d_sae = trainee.autoencoder.d_sae
        self._trainee = [trainee]  # in a list, so that its parameters are not registered a second time
        self.rows_per_pass = rows_per_pass
        self.l0 = L0()
        self.fvu = FVU(trainee.mean_out)
        self.loss = MSE()
        self.mse = MSE()
        self.firing = FiringDensity(d_sae)
        self.recovery = DictionaryRecovery(planted_TD) if planted_TD is not None else None
        self._cross_entropy = cross_entropy
        self._correction = 1.0

    @property
    def measures_cross_entropy(self) -> bool:
        """Whether the language model is run."""
        return self._cross_entropy is not None

    @torch.no_grad()
    def update(self, x_BD: Tensor) -> None:
        """x_BD: [B, D_all] raw validation activations."""
        trainee = self._trainee[0]
        x_in_BD, y_BD = trainee.scaled(x_BD)
        step = trainee.autoencoder.evaluate(x_in_BD, y_BD, trainee.controller.strength)
        self.l0.update(step.firings_F, len(y_BD))
        self.fvu.update(y_BD, step.y_hat_BD)
        self.loss.update(y_BD, step.y_hat_BD)
        self.mse.update(y_BD / trainee.scale_out, step.y_hat_BD / trainee.scale_out)
        self.firing.update(step.firings_F, len(y_BD))

    @torch.no_grad()
    def finish(self, samples: int, last: bool = False) -> Row:
        """The row of this validation, merged over ranks; clears the metrics for the next.

        Args:
            samples: the clock.
            last: whether it is the run's last, which measures more.
        """
        trainee = self._trainee[0]
        density_F = self.firing.compute()
        silent_F = trainee.dead.silent_mask(max(0, samples - self.rows_per_pass)) & (density_F == 0)
        row: Row = {
            "val/loss": float(self.loss.compute()) * trainee.autoencoder.d_out,
            "val/l0": float(self.l0.compute()),
            "val/fvu": float(self.fvu.compute()),
            "val/mse": float(self.mse.compute()),
            "val/silent_latents": int(silent_F.sum()),
            "val/firing_density_histogram": self.firing.histogram(),
        }
        if self.recovery is not None:
            self.recovery.update(trainee.autoencoder.W_dec)
            row["val/recovery"] = float(self.recovery.compute())
        for metric in (self.l0, self.fvu, self.loss, self.mse, self.firing, self.recovery):
            if metric is not None:
                metric.reset()
        return row | self.cross_entropy(last=last)

    @torch.no_grad()
    def cross_entropy(self, *, often: bool = False, last: bool = False) -> Row:
        """The language model's figures, `val/ce` and so on; nothing where they are not asked for.

        Args:
            often: as measured between validations, on a smaller text.
            last: with those that are measured once in a run.
        """
        if self._cross_entropy is None:
            return {}
        device = self._trainee[0].scale_in.device
        figures = self._cross_entropy.measure(
            self._reconstruct, often=often, correction=self._correction, last=last, device=device
        )
        self._correction = figures.pop("correction", self._correction)
        return {f"val/{name}": value for name, value in figures.items()}

    def get_extra_state(self) -> dict[str, float]:
        """What measurements between validations hang on."""
        return {"correction": self._correction}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self._correction = state["correction"]

    def _reconstruct(self, x_BD: Tensor) -> Tensor:
        """[B, d_out] raw, from the one site that is read: the others' columns have no say in it."""
        sites = self._trainee[0].sites
        columns = [site.columns for site in (*sites.reads, *(sites.writes or ()))]
        all_BD = x_BD.new_zeros(len(x_BD), max(column.stop for column in columns))
        all_BD[:, columns[0]] = x_BD
        return self._trainee[0].reconstruct(all_BD)

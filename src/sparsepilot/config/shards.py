"""What a run whose latents are dealt out over ranks can do, and what it cannot."""

from __future__ import annotations

from typing import Any

from sparsepilot.errors import ConfigError
from sparsepilot.ranks import num_devices, num_shards


def check_shards(plain: dict[str, Any]) -> None:
    """Checks a whole configuration (plain values, each group checked by itself) for `trainer.strategy.features`.

    Raises:
        ConfigError: naming what works instead.
    """
    trainer, d_sae = plain["trainer"], plain["model"]["d_sae"]
    features = num_shards(trainer)
    if features == 1:
        return
    world = num_devices(trainer) * trainer.get("num_nodes", 1)
    if world % features:
        allowed = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(
            f"trainer.strategy.features = {features}: must divide the {world} ranks; so many do: {allowed}"
        )
    if d_sae % features:
        below = d_sae // features * features
        right = f"{below} or {below + features}" if below else str(features)
        raise ConfigError(
            f"model.d_sae = {d_sae}: must be a multiple of {features}, the ranks that share the latents "
            f"(trainer.strategy.features), e.g. {right}"
        )
    if plain["optimizer"]["_target_"].endswith(".MuonWithAdam"):
        raise ConfigError(
            f"optimizer=muon: needs whole matrices, whose rows lie on {features} ranks here; use optimizer=adam, adamw "
            "or sign, or trainer=ddp or fsdp"
        )
    if trainer.get("reproducible"):
        raise ConfigError(
            "trainer.reproducible = True: reconstructions are added up over ranks here, and their last bits hang on "
            "how many there are; use trainer=ddp"
        )
    sites = plain["model"].get("sites")
    if isinstance(sites, dict) and sites.get("cross_layer"):
        raise ConfigError(
            f"model.sites.cross_layer = True: its latents cannot be dealt out to {features} ranks; use trainer=ddp or "
            "fsdp, or an autoencoder, a crosscoder or a transcoder"
        )
    if plain["compile"]:
        raise ConfigError(
            "compile = True: the dense path of a step, which it is for, waits for other ranks here; use compile=false, "
            "or trainer=ddp"
        )

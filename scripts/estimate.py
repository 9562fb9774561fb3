"""What a run will need, before it is started: parameters, memory, disk, traffic, time.

python scripts/estimate.py model=topk data=cache data.path=cache/mine 'data.sites=[model.layers.12]'
python scripts/estimate.py model=topk model.d_sae=1_048_576 data=cache d_in=2304 rows=200_000_000 \
       trainer=fsdp devices=64 nodes=8 device=h100 samples=1_000_000_000        # none of it needs to be there
python scripts/estimate.py model=relu data=synthetic calibrate=true             # times a few smaller steps here
python scripts/estimate.py scaling=docs/scaling.md                              # writes that page

Takes every override of train.py, and: devices=N (in all) and nodes=N, device=NAME (a GPU's data sheet), d_in=N (width
of each site) and rows=N (training rows) where there is no cache yet, l0=N (what a model with a penalty will settle at),
dead=0.1 (share of dead latents, for AuxK), calibrate=true, json=PATH.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sparsepilot.config.cli import arguments, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.process_memory import ask_for_huge_pages

CONF = Path(__file__).resolve().parents[1] / "conf"
OWN: dict[str, Any] = {
    "devices": None, "nodes": None, "device": None, "d_in": None, "rows": None, "l0": None, "dead": 0.1,
    "calibrate": False, "json": None, "scaling": None,
}  # fmt: skip


def main() -> None:
    """Tells its own field=value arguments from those of train.py."""
    words = sys.argv[1:]
    own = arguments([word for word in words if word.partition("=")[0] in OWN], OWN)
    overrides = [word for word in words if word.partition("=")[0] not in OWN]
    if own["scaling"] is not None:
        if len(words) > 1:
            raise ConfigError(f"scaling = {own['scaling']}: writes a whole page, and takes nothing else")
        from sparsepilot.estimate.scaling import page

        Path(own["scaling"]).write_text(page(CONF), encoding="utf-8")
        print(own["scaling"])
        return
    from sparsepilot.estimate.report import compose_config, estimate, print_estimate

    options = {name: own[name] for name in OWN if name not in ("calibrate", "json", "scaling")}
    found = estimate(compose_config(CONF, overrides), options, calibrate=own["calibrate"])
    print_estimate(found)
    if own["json"] is not None:
        Path(own["json"]).parent.mkdir(parents=True, exist_ok=True)
        Path(own["json"]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    ask_for_huge_pages()
    with user_errors():
        main()

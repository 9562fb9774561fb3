"""Trains a sparse autoencoder: python train.py [group=option ...] [field=value ...]; see conf/train.yaml."""

from sparsepilot import slurm

slurm.leave_during_start_up()  # before anything that takes long to import

import hydra
from omegaconf import DictConfig

from sparsepilot.config.cli import one_run, run
from sparsepilot.launch import start_ranks


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    with one_run(cfg):
        if not start_ranks(cfg, __file__):
            from sparsepilot.run import train  # after the configuration composed: a typo need not wait for torch

            train(cfg)


if __name__ == "__main__":
    run(main, ranks_alike=True)

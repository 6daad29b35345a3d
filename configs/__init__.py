"""The Hydra groups that ship with the package: `pkg://pkm_lightning.configs`."""

"""`python -m pkm_lightning VERB [hydra overrides]`."""

from pkm_lightning.cli.main import main

if __name__ == "__main__":
    main()

"""Shared parts of the commands `bench_*.py`; they need nothing but torch and triton where no module states more."""

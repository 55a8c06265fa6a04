"""The same SAE by every trainer, and by every route."""

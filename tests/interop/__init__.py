"""Tests against other packages, in an environment that has them (make test-interop)."""

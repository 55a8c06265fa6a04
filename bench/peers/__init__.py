"""The packages people use, as contenders."""

"""Mechanic for PyTorch: wrap any optimizer, keep the schedule, never tune the learning-rate scale again."""

from mechanic_pytorch import optim
from mechanic_pytorch.mechanic import Mechanic, is_mechanized, mechanize
from mechanic_pytorch.scripts.patch import patched

__all__ = ["Mechanic", "is_mechanized", "mechanize", "optim", "patched"]

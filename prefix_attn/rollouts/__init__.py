"""Reads rollout files for `prefix-attn inspect`."""

from prefix_attn.rollouts.columns import Rollouts, read
from prefix_attn.rollouts.files import ReadError

__all__ = ["ReadError", "Rollouts", "read"]

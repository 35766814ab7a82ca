"""Contrastive losses."""

from textcond.losses.infonce import info_nce

__all__ = ["info_nce"]

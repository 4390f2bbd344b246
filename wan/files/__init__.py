"""Checkpoints: bytes on disk to modules, whatever tool wrote them."""

"""Tests of the nodes and graphs for ComfyUI."""

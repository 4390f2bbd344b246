"""ComfyUI nodes for one-frame LoRAs of Wan: copy this folder into `custom_nodes` and start ComfyUI again.

It stands alone: nothing of the rest of the project is imported. See docs/comfyui.md.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

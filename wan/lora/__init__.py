"""LoRA, LoHa and LoKr: files and their dialects, merging, and the trained layers."""

"""The one-frame idea: which frame sits at which time index, and how frames become latents and conditions."""

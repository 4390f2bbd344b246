"""From flags to a model that is loaded and prepared for its device."""

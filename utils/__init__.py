"""Command line, prompt files, images, files and errors: what every part shares and none owns."""

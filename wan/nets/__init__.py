"""The networks: maths only. They open no files and move nothing between devices."""

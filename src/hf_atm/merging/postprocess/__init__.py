"""Post-processors of a merged task vector, and their register."""

"""Files: reading and writing, downloads, archives, locks."""

"""Studies, one file each, and the runner that carries them out."""

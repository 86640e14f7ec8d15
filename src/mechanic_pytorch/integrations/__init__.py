"""Callbacks for trainers, one file each, which alone imports what it is for."""

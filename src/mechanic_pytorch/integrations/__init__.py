"""Callbacks for the training loops of others, one file each, which alone imports what it is for."""

"""What scripts for rlms find under ``rlm.utils``."""

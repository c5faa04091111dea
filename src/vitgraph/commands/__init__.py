"""The commands of `vitgraph`, one file each. Torch is imported inside the commands, never by these modules."""

"""The proxy of a rank: moves bytes between its rings and its peers, in a process that never imports torch."""
